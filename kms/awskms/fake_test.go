package awskms_test

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
)

// fake is AWS KMS as its API reference describes it, as far as this package uses
// it, with what the emulators lack: ids of key material, rotation on demand and
// its cap, IncorrectKeyException, keys of other regions, multi-region keys, and
// credentials that are not accepted.
type fake struct {
	region, account string

	mu      sync.Mutex // guards what follows
	keys    map[string]*fakeKey
	aliases map[string]string // to ids of keys
	refused map[string]bool   // access keys that are no longer accepted
	lag     int               // answers of DescribeKey that still show the old state
}

type fakeKey struct {
	id, state, spec, usage string
	multi                  bool
	material               [][]byte
	described              *map[string]any // while it lags
}

func newFake(region string) *fake {
	return &fake{region: region, account: "111122223333", keys: map[string]*fakeKey{}, aliases: map[string]string{}, refused: map[string]bool{}}
}

func (f *fake) create() *fakeKey {
	f.mu.Lock()
	defer f.mu.Unlock()
	id := random(16)
	h := hex.EncodeToString(id)
	k := &fakeKey{
		id:    strings.Join([]string{h[:8], h[8:12], h[12:16], h[16:20], h[20:]}, "-"),
		state: "Enabled", spec: "SYMMETRIC_DEFAULT", usage: "ENCRYPT_DECRYPT", material: [][]byte{random(32)},
	}
	f.keys[k.id] = k
	return k
}

func random(n int) []byte {
	b := make([]byte, n)
	_, _ = rand.Read(b)
	return b
}

func (f *fake) arn(k *fakeKey) string {
	partition := "aws"
	if strings.HasPrefix(f.region, "cn-") {
		partition = "aws-cn"
	}
	return fmt.Sprintf("arn:%s:kms:%s:%s:key/%s", partition, f.region, f.account, k.id)
}

func (f *fake) set(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
}

type fakeError struct{ code, message string }

// ServeHTTP speaks the protocol: JSON 1.1, the operation in X-Amz-Target.
func (f *fake) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	var in map[string]any
	_ = json.NewDecoder(r.Body).Decode(&in)
	_, operation, _ := strings.Cut(r.Header.Get("X-Amz-Target"), ".")
	f.mu.Lock()
	out, failed := f.answer(r, operation, in)
	f.mu.Unlock()
	w.Header().Set("Content-Type", "application/x-amz-json-1.1")
	w.Header().Set("X-Amzn-Requestid", "01234567-89ab-cdef-0123-456789abcdef")
	if failed != nil {
		w.WriteHeader(http.StatusBadRequest)
		out = map[string]any{"__type": failed.code, "message": failed.message}
	}
	_ = json.NewEncoder(w).Encode(out)
}

func (f *fake) answer(r *http.Request, operation string, in map[string]any) (any, *fakeError) {
	_, credential, _ := strings.Cut(r.Header.Get("Authorization"), "Credential=")
	accessKey, _, _ := strings.Cut(credential, "/")
	if accessKey == "" || f.refused[accessKey] {
		return nil, &fakeError{"ExpiredTokenException", "The security token included in the request is expired"}
	}
	text := func(name string) string { s, _ := in[name].(string); return s }
	switch operation {
	case "DescribeKey":
		k, failed := f.find(text("KeyId"))
		if failed != nil {
			return nil, failed
		}
		return f.describe(k), nil
	case "GenerateDataKey":
		k, failed := f.usable(text("KeyId"))
		if failed != nil {
			return nil, failed
		}
		key := random(32)
		blob, material := k.seal(key, in["EncryptionContext"])
		return map[string]any{"KeyId": f.arn(k), "Plaintext": key, "CiphertextBlob": blob, "KeyMaterialId": material}, nil
	case "Encrypt":
		k, failed := f.usable(text("KeyId"))
		if failed != nil {
			return nil, failed
		}
		blob, _ := k.seal(decode64(text("Plaintext")), in["EncryptionContext"])
		return map[string]any{"KeyId": f.arn(k), "CiphertextBlob": blob}, nil
	case "Decrypt":
		o, failed := f.open(text("KeyId"), text("CiphertextBlob"), in["EncryptionContext"])
		if failed != nil {
			return nil, failed
		}
		return map[string]any{"KeyId": f.arn(o.by), "Plaintext": o.plaintext, "KeyMaterialId": o.material}, nil
	case "ReEncrypt":
		o, failed := f.open(text("SourceKeyId"), text("CiphertextBlob"), in["SourceEncryptionContext"])
		if failed != nil {
			return nil, failed
		}
		to, failed := f.usable(text("DestinationKeyId"))
		if failed != nil {
			return nil, failed
		}
		blob, latest := to.seal(o.plaintext, in["DestinationEncryptionContext"])
		return map[string]any{
			"KeyId": f.arn(to), "SourceKeyId": f.arn(o.by), "CiphertextBlob": blob,
			"SourceKeyMaterialId": o.material, "DestinationKeyMaterialId": latest,
		}, nil
	case "RotateKeyOnDemand":
		k, failed := f.usable(text("KeyId"))
		if failed != nil {
			return nil, failed
		}
		if len(k.material) > 25 {
			return nil, &fakeError{"LimitExceededException", "The on-demand rotations quota has been exceeded for the key."}
		}
		k.hold(f)
		k.material = append(k.material, random(32))
		return map[string]any{"KeyId": f.arn(k)}, nil
	case "DisableKey":
		k, failed := f.find(text("KeyId"))
		if failed != nil {
			return nil, failed
		}
		k.hold(f)
		k.state = "Disabled"
		return map[string]any{}, nil
	default:
		return nil, &fakeError{"UnknownOperationException", ""}
	}
}

// hold keeps the description of a moment ago for the next f.lag answers.
func (k *fakeKey) hold(f *fake) {
	if f.lag > 0 {
		d := f.describe(k)
		k.described = &d
	}
}

func (f *fake) describe(k *fakeKey) map[string]any {
	if k.described != nil {
		if f.lag--; f.lag >= 0 {
			return *k.described
		}
		k.described = nil
	}
	return map[string]any{"KeyMetadata": map[string]any{
		"Arn": f.arn(k), "KeyId": k.id, "AWSAccountId": f.account, "Enabled": k.state == "Enabled", "KeyState": k.state,
		"KeySpec": k.spec, "KeyUsage": k.usage, "MultiRegion": k.multi, "CurrentKeyMaterialId": materialID(k.material[len(k.material)-1]),
	}}
}

func (f *fake) find(name string) (*fakeKey, *fakeError) {
	if rest, ok := strings.CutPrefix(name, "arn:"); ok {
		parts := strings.SplitN(rest, ":", 5)
		name = strings.TrimPrefix(parts[len(parts)-1], "key/")
	}
	if id, ok := f.aliases[name]; ok {
		name = id
	}
	if k := f.keys[name]; k != nil {
		return k, nil
	}
	return nil, &fakeError{"NotFoundException", "Key 'arn:…' does not exist " + canary}
}

func (f *fake) usable(name string) (*fakeKey, *fakeError) {
	k, failed := f.find(name)
	switch {
	case failed != nil:
		return nil, failed
	case k.state == "Enabled":
		return k, nil
	case k.state == "Disabled":
		return nil, &fakeError{"DisabledException", f.arn(k) + " is disabled. " + canary}
	case k.state == "PendingDeletion":
		return nil, &fakeError{"KMSInvalidStateException", f.arn(k) + " is pending deletion. " + canary}
	default:
		return nil, &fakeError{"com.amazonaws.kms#KMSInvalidStateException", f.arn(k) + " is in state " + k.state + " " + canary}
	}
}

func (k *fakeKey) seal(plaintext []byte, context any) (blob []byte, material string) {
	n := len(k.material) - 1
	blob = append([]byte(k.id), binary.BigEndian.AppendUint16(nil, uint16(n))...)
	return aead(k.material[n]).Seal(blob, nil, plaintext, additional(context)), materialID(k.material[n])
}

// opened is a plaintext and what decrypted it.
type opened struct {
	by        *fakeKey
	plaintext []byte
	material  string
}

func (f *fake) open(name, text string, context any) (opened, *fakeError) {
	named, failed := f.find(name)
	if failed != nil && name != "" {
		return opened{}, failed
	}
	blob := decode64(text)
	if len(blob) < 36+2+12 {
		return opened{}, &fakeError{"InvalidCiphertextException", canary}
	}
	k := f.keys[string(blob[:36])]
	if k == nil {
		return opened{}, &fakeError{"InvalidCiphertextException", canary}
	}
	if name != "" && named != k {
		return opened{}, &fakeError{"IncorrectKeyException", "The key ID in the request does not identify a CMK that can perform this operation. " + canary}
	}
	if _, failed := f.usable(k.id); failed != nil {
		return opened{}, failed
	}
	n := int(binary.BigEndian.Uint16(blob[36:]))
	if n >= len(k.material) {
		return opened{}, &fakeError{"InvalidCiphertextException", canary}
	}
	plaintext, err := aead(k.material[n]).Open(nil, nil, blob[38:], additional(context))
	if err != nil {
		return opened{}, &fakeError{"InvalidCiphertextException", canary}
	}
	return opened{k, plaintext, materialID(k.material[n])}, nil
}

func aead(key []byte) cipher.AEAD {
	block, err := aes.NewCipher(key)
	if err != nil {
		panic(err)
	}
	a, err := cipher.NewGCMWithRandomNonce(block)
	if err != nil {
		panic(err)
	}
	return a
}

func additional(context any) []byte {
	entries, _ := context.(map[string]any)
	var b bytes.Buffer
	for _, name := range slices.Sorted(maps.Keys(entries)) {
		fmt.Fprintf(&b, "%q=%q;", name, entries[name])
	}
	return b.Bytes()
}

func materialID(material []byte) string {
	sum := sha256.Sum256(material)
	return hex.EncodeToString(sum[:])
}

func decode64(text string) []byte {
	var b []byte
	_ = json.Unmarshal([]byte(`"`+text+`"`), &b)
	return b
}
