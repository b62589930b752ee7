package awskms_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
	service "github.com/aws/aws-sdk-go-v2/service/kms"
	"github.com/aws/aws-sdk-go-v2/service/kms/types"

	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/kms/awskms"
	"github.com/cofferdb/coffer/kms/internal/serverstest"
	"github.com/cofferdb/coffer/kms/kmstest"
)

// suite knows of each provider of kmstest.RunProvider where its key is and what
// stands before KMS.
type suite struct {
	behind http.Handler
	region string

	mu      sync.Mutex
	clients map[kms.Provider]*suiteClient // guarded by mu
}

type suiteClient struct {
	options awskms.Options
	front   *front
	calls   *calls
	source  *source
}

// provider hides what AWS cannot do: Retire only says so.
type provider struct {
	kms.Provider
	kms.Rotator
}

// plain hides rotation too, which the emulators lack.
type plain struct{ kms.Provider }

// accessKey is the client's own: no two clients of a suite, which keeps them all,
// have the same address, while a port may be given out again.
func (c *suiteClient) accessKey() string { return fmt.Sprintf("AKID%p", c) }

func (u *suite) open(tb testing.TB, arn string, hide func(*awskms.Provider) kms.Provider) kms.Provider {
	tb.Helper()
	c := &suiteClient{front: newFront(tb, u.behind), calls: &calls{}, source: &source{}}
	c.source.set(c.accessKey(), nil)
	c.options = options(c.front.URL, arn, u.region)
	c.options.Observe = c.calls.observe
	c.options.Credentials = c.source
	p := hide(open(tb, c.options))
	u.mu.Lock()
	defer u.mu.Unlock()
	u.clients[p] = c
	return p
}

func (u *suite) of(p kms.Provider) *suiteClient {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.clients[p]
}

func (u *suite) answering(status int, code string) func(testing.TB, kms.Provider) func() {
	return func(_ testing.TB, p kms.Provider) func() {
		u.of(p).front.set(answering(status, code))
		return func() { u.of(p).front.set(nil) }
	}
}

func (u *suite) harness(newKey func(testing.TB) string, hide func(*awskms.Provider) kms.Provider) kmstest.Harness {
	return kmstest.Harness{
		New:   func(tb testing.TB) kms.Provider { return u.open(tb, newKey(tb), hide) },
		Again: func(tb testing.TB, p kms.Provider) kms.Provider { return u.open(tb, u.of(p).options.Key, hide) },
		Hang: func(_ testing.TB, p kms.Provider) func() {
			release := make(chan struct{})
			u.of(p).front.set(hanging(release))
			return func() {
				u.of(p).front.set(nil)
				close(release)
			}
		},
		Fail: map[error]func(testing.TB, kms.Provider) func(){
			kms.ErrAccessDenied:    u.answering(400, "AccessDeniedException"),
			kms.ErrUnauthenticated: u.answering(400, "UnrecognizedClientException"),
			kms.ErrThrottled:       u.answering(400, "ThrottlingException"),
			kms.ErrQuota:           u.answering(400, "LimitExceededException"),
			kms.ErrUnavailable:     u.answering(500, "KMSInternalException"),
			kms.ErrNotFound:        u.answering(400, "NotFoundException"),
		},
		WrongRegion: func(tb testing.TB, p kms.Provider) error {
			o := u.of(p).options
			o.Region = "eu-central-1"
			_, err := awskms.New(tb.Context(), o)
			return err
		},
		Calls: func(p kms.Provider) []kms.Call { return u.of(p).calls.all() },
		Cannot: map[string]string{
			"Retire":            "AWS keeps old material able to decrypt",
			"Rotate":            "this emulator has no key material to rotate",
			"ExpireCredentials": "this emulator accepts any credentials",
		},
		Secrets: []string{secretKey, canary},
	}
}

func TestConformanceFake(t *testing.T) {
	f := newFake("eu-west-2")
	u := &suite{behind: f, region: f.region, clients: map[kms.Provider]*suiteClient{}}
	h := u.harness(
		func(testing.TB) string { return f.arn(f.create()) },
		func(p *awskms.Provider) kms.Provider { return provider{p, p} },
	)
	delete(h.Cannot, "Rotate")
	delete(h.Cannot, "ExpireCredentials")
	h.ExpireCredentials = func(_ testing.TB, p kms.Provider) {
		c := u.of(p)
		f.set(func() { f.refused[c.accessKey()] = true })
		c.source.set(c.accessKey()+"NEXT", nil)
	}
	state := func(to string) func(testing.TB, kms.Provider) func() {
		return func(_ testing.TB, p kms.Provider) func() {
			f.mu.Lock()
			defer f.mu.Unlock()
			k, _ := f.find(u.of(p).options.Key)
			k.state = to
			return func() { f.set(func() { k.state = "Enabled" }) }
		}
	}
	h.Fail[kms.ErrDisabled] = state("Disabled")
	h.Fail[kms.ErrPendingDeletion] = state("PendingDeletion")
	h.Fail[kms.ErrNotFound] = func(_ testing.TB, p kms.Provider) func() {
		f.set(func() {
			k, _ := f.find(u.of(p).options.Key)
			delete(f.keys, k.id)
		})
		return nil
	}
	h.Fail[kms.ErrUnauthenticated] = func(_ testing.TB, p kms.Provider) func() {
		id := u.of(p).accessKey()
		f.set(func() { f.refused[id] = true })
		return func() { f.set(func() { delete(f.refused, id) }) }
	}
	kmstest.RunProvider(t, h)
}

// admin makes keys and changes their state.
type admin struct {
	url    string
	client *service.Client
}

func adminOf(t *testing.T, url, region string) admin {
	t.Helper()
	client := &http.Client{}
	t.Cleanup(client.CloseIdleConnections)
	return admin{url, service.New(service.Options{
		Region: region, BaseEndpoint: aws.String(url), HTTPClient: client,
		Credentials: credentials.NewStaticCredentialsProvider("AKIDADMIN", secretKey, ""),
	})}
}

func emulator(t *testing.T, url, region string) (*suite, kmstest.Harness) {
	t.Helper()
	a := adminOf(t, url, region)
	u := &suite{behind: strict(reverse(t, url)), region: region, clients: map[kms.Provider]*suiteClient{}}
	return u, u.harness(
		func(tb testing.TB) string {
			k, err := a.client.CreateKey(tb.Context(), &service.CreateKeyInput{KeySpec: types.KeySpecSymmetricDefault, KeyUsage: types.KeyUsageTypeEncryptDecrypt})
			must(tb, err)
			return aws.ToString(k.KeyMetadata.Arn)
		},
		func(p *awskms.Provider) kms.Provider { return plain{p} },
	)
}

// pendingDeletion is KMS's answer about a key in that state. Both emulators
// answer Decrypt otherwise: local-kms with AccessDeniedException, moto as if
// nothing were.
func (u *suite) pendingDeletion(_ testing.TB, p kms.Provider) func() {
	u.of(p).front.set(func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusBadRequest)
		_, _ = io.WriteString(w, `{"__type":"KMSInvalidStateException","message":"arn:aws:kms:… is pending deletion."}`)
	})
	return func() { u.of(p).front.set(nil) }
}

func TestConformanceLocalKMS(t *testing.T) {
	s := serverstest.Start(t, serverstest.Binary(t, serverstest.LocalKMS), "-region", "eu-west-2", "-storage", t.TempDir())
	u, h := emulator(t, s.URL, "eu-west-2")
	h.Fail[kms.ErrDisabled] = u.answering(400, "DisabledException")
	h.Fail[kms.ErrPendingDeletion] = u.pendingDeletion
	kmstest.RunProvider(t, h)
}

// strict stands before an emulator and does what AWS does and they do not: it
// refuses the blob of another key than the one named, as local-kms does not if
// the name in the blob was changed, and moto with another code.
func strict(behind http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return
		}
		var in struct {
			Key    string `json:"KeyId"`
			Source string `json:"SourceKeyId"`
			Blob   []byte `json:"CiphertextBlob"`
		}
		_ = json.Unmarshal(body, &in)
		_, id, _ := strings.Cut(in.Key+in.Source, "/")
		if in.Blob != nil && !bytes.Contains(in.Blob, []byte(id)) {
			answering(400, "IncorrectKeyException")(w, r)
			return
		}
		r.Body = io.NopCloser(bytes.NewReader(body))
		behind.ServeHTTP(w, r)
	})
}

func TestConformanceMoto(t *testing.T) {
	s := serverstest.StartMoto(t)
	u, h := emulator(t, s.URL, "eu-west-2")
	h.Fail[kms.ErrDisabled] = u.answering(400, "DisabledException")
	h.Fail[kms.ErrPendingDeletion] = u.pendingDeletion
	kmstest.RunProvider(t, h)
}

// States of a key, as far as each emulator keeps them: DescribeKey shows them,
// and recovery needs no restart.
func TestStatesOfEmulators(t *testing.T) {
	for name, start := range map[string]func(*testing.T) string{
		"local-kms": func(t *testing.T) string {
			return serverstest.Start(t, serverstest.Binary(t, serverstest.LocalKMS), "-region", "eu-west-2", "-storage", t.TempDir()).URL
		},
		"moto": func(t *testing.T) string { return newFront(t, reverse(t, serverstest.StartMoto(t).URL)).URL },
	} {
		t.Run(name, func(t *testing.T) {
			admin := adminOf(t, start(t), "eu-west-2")
			k, err := admin.client.CreateKey(t.Context(), &service.CreateKeyInput{KeySpec: types.KeySpecSymmetricDefault, KeyUsage: types.KeyUsageTypeEncryptDecrypt})
			must(t, err)
			id := k.KeyMetadata.KeyId // moto fails at some operations with an ARN
			_, err = admin.client.CreateAlias(t.Context(), &service.CreateAliasInput{AliasName: aws.String("alias/coffer-eu"), TargetKeyId: id})
			must(t, err)
			p := open(t, options(admin.url, "alias/coffer-eu", "eu-west-2"))
			key, w, err := p.Generate(t.Context(), binding)
			must(t, err)
			if w.Key != aws.ToString(k.KeyMetadata.Arn) {
				t.Errorf("the wrap names %s, not the ARN", w.Key)
			}
			state := func(want kms.State, class error) {
				t.Helper()
				d, err := p.Describe(t.Context())
				must(t, err)
				if d.State != want || d.Key != w.Key || d.Region != "eu-west-2" {
					t.Errorf("described as %+v, want state %s", d, want)
				}
				// Of a key in a bad state neither emulator answers Decrypt as AWS does.
				got, err := p.Unwrap(t.Context(), binding, w)
				if class == nil && (err != nil || !bytes.Equal(got, key)) {
					t.Errorf("in state %s: another key, or %v", want, err)
				}
				if _, _, err := p.Generate(t.Context(), binding); name == "local-kms" && class != nil && !errors.Is(err, class) {
					t.Errorf("in state %s: %v, want %v", want, err, class)
				}
			}
			state(kms.StateEnabled, nil)
			if name == "moto" {
				_, err = admin.client.DisableKey(t.Context(), &service.DisableKeyInput{KeyId: id})
				must(t, err)
			}
			must(t, p.Disable(t.Context()))
			state(kms.StateDisabled, kms.ErrDisabled)
			must(t, p.Disable(t.Context()))
			_, err = admin.client.EnableKey(t.Context(), &service.EnableKeyInput{KeyId: id})
			must(t, err)
			state(kms.StateEnabled, nil)
			_, err = admin.client.ScheduleKeyDeletion(t.Context(), &service.ScheduleKeyDeletionInput{KeyId: id, PendingWindowInDays: aws.Int32(7)})
			must(t, err)
			state(kms.StatePendingDeletion, kms.ErrPendingDeletion)
			_, err = admin.client.CancelKeyDeletion(t.Context(), &service.CancelKeyDeletionInput{KeyId: id})
			must(t, err)
			_, err = admin.client.EnableKey(t.Context(), &service.EnableKeyInput{KeyId: id})
			must(t, err)
			state(kms.StateEnabled, nil)
		})
	}
}
