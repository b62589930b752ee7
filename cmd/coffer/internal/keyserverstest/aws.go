package keyserverstest

import (
	"bytes"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"
)

// AWS is an emulator of AWS KMS in a process of its own, with a key.
type AWS struct {
	t       *testing.T
	process *Server
	region  string
	Key     string // its id
}

// NewAWS starts local-kms until the test ends. All its keys are in the region.
func NewAWS(t *testing.T, region string) *AWS {
	t.Helper()
	path := binary(t, "localkms", "COFFER_TEST_LOCALKMS")
	return newAWS(t, region, start(t, path, "-region", region))
}

// NewMoto starts moto until the test ends. Its keys are in the region that a
// request is signed for.
func NewMoto(t *testing.T, region string) *AWS {
	t.Helper()
	path := binary(t, "moto/bin/moto_server", "COFFER_TEST_MOTO")
	listener, err := net.Listen("tcp", "127.0.0.1:0") //nolint:noctx // only to find a free port
	if err != nil {
		t.Fatal(err)
	}
	address := listener.Addr().String()
	host, port, _ := net.SplitHostPort(address) //nolint:errcheck // our own listener's
	_ = listener.Close()
	s, out := begin(t, path, "-H", host, "-p", port)
	go func() { _, _ = io.Copy(io.Discard, out) }()
	s.URL = "http://" + address
	for end := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) { // Python loads for seconds
		resp, err := http.Get(s.URL) //nolint:noctx // a test
		if err == nil {
			_ = resp.Body.Close()
			return newAWS(t, region, s)
		}
		if time.Now().After(end) {
			t.Fatalf("%s does not answer", path)
		}
	}
}

func newAWS(t *testing.T, region string, s *Server) *AWS {
	t.Helper()
	for name, value := range map[string]string{
		"AWS_ACCESS_KEY_ID": "AKIDTEST", "AWS_SECRET_ACCESS_KEY": strings.Repeat("secret", 7), "AWS_EC2_METADATA_DISABLED": "true",
		"AWS_CONFIG_FILE": "/nonexistent", "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
	} {
		t.Setenv(name, value)
	}
	a := &AWS{t: t, process: s}
	return a.In(region)
}

// In returns the emulator as it is used in a region, with a new key there.
func (a *AWS) In(region string) *AWS {
	a.t.Helper()
	b := &AWS{t: a.t, process: a.process, region: region}
	b.Key = b.Call("CreateKey", map[string]any{"KeySpec": "SYMMETRIC_DEFAULT", "KeyUsage": "ENCRYPT_DECRYPT"})["KeyMetadata"].(map[string]any)["KeyId"].(string)
	return b
}

// Call is a request of the administrator, about the key.
func (a *AWS) Call(operation string, body map[string]any) map[string]any {
	a.t.Helper()
	if a.Key != "" {
		body["KeyId"] = a.Key
	}
	text, err := json.Marshal(body)
	if err != nil {
		a.t.Fatal(err)
	}
	req, err := http.NewRequestWithContext(a.t.Context(), "POST", a.process.URL, bytes.NewReader(text))
	if err != nil {
		a.t.Fatal(err)
	}
	req.Header.Set("X-Amz-Target", "TrentService."+operation)
	req.Header.Set("Content-Type", "application/x-amz-json-1.1")
	req.Header.Set("Authorization", "AWS4-HMAC-SHA256 Credential=AKIDTEST/20260101/"+a.region+"/kms/aws4_request, SignedHeaders=host, Signature=00")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		a.t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	raw, _ := io.ReadAll(resp.Body)
	answer := map[string]any{}
	_ = json.Unmarshal(raw, &answer)
	if resp.StatusCode != http.StatusOK {
		a.t.Fatalf("%s: %d %s", operation, resp.StatusCode, raw)
	}
	return answer
}

// Setting is a region's kms setting.
func (a *AWS) Setting() string {
	return "awskms:///" + a.Key + "?region=" + a.region + "&timeout=1s&attempts=1&endpoint=" + url.QueryEscape(a.process.URL)
}
