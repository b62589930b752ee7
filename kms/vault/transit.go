package vault

import (
	"context"
	"errors"
	"io"
	"mime"
	"strconv"
	"strings"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"github.com/hashicorp/vault/api"

	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/kms/internal/retry"
)

// maxBatch is how many keys one request rewraps: about 150 KB of Vault's 32 MB.
const maxBatch = 500

// keyData is what transit tells about a key.
type keyData struct {
	Type          string `json:"type"`
	Derived       bool   `json:"derived"`
	Convergent    bool   `json:"convergent_encryption"`
	Latest        int    `json:"latest_version"`
	MinDecryption int    `json:"min_decryption_version"`
	MinEncryption int    `json:"min_encryption_version"`
	MinAvailable  int    `json:"min_available_version"`
}

type wrapInput struct {
	Plaintext []byte `json:"plaintext"`
	Context   []byte `json:"context"`
}

type generateInput struct {
	Bits    int    `json:"bits"`
	Context []byte `json:"context"`
}

type ciphertextInput struct {
	Ciphertext string `json:"ciphertext"`
	Context    []byte `json:"context"`
}

type batchInput struct {
	Items []ciphertextInput `json:"batch_input"`
}

type keyAnswer struct {
	Plaintext  []byte `json:"plaintext"`
	Ciphertext string `json:"ciphertext"`
}

type batchAnswer struct {
	Results []struct {
		Ciphertext string `json:"ciphertext"`
		Error      string `json:"error"`
	} `json:"batch_results"`
}

// Generate has Vault make a key and wrap it.
func (p *Provider) Generate(ctx context.Context, binding kms.Context) ([]byte, kms.Wrap, error) {
	const op = "generate"
	if err := binding.Validate(); err != nil {
		return nil, kms.Wrap{}, err
	}
	if err := p.check(ctx); err != nil {
		return nil, kms.Wrap{}, err
	}
	var a keyAnswer
	err := p.call(ctx, request{
		op: op, path: "datakey/plaintext/" + p.key, items: 1,
		body: generateInput{Bits: 8 * kms.KeySize, Context: binding.Encode()}, into: &a,
	})
	if err != nil {
		return nil, kms.Wrap{}, err
	}
	w, err := p.wrapped(op, a.Ciphertext)
	if err == nil && len(a.Plaintext) != kms.KeySize {
		err = p.fail(op, kms.ErrUnavailable, "the answer holds no key of 256 bits")
	}
	if err != nil {
		clear(a.Plaintext)
		return nil, kms.Wrap{}, err
	}
	return a.Plaintext, w, nil
}

// Wrap encrypts key.
func (p *Provider) Wrap(ctx context.Context, binding kms.Context, key []byte) (kms.Wrap, error) {
	const op = "wrap"
	if err := binding.Validate(); err != nil {
		return kms.Wrap{}, err
	}
	if len(key) != kms.KeySize {
		return kms.Wrap{}, inputError(op, "the key has not 32 bytes")
	}
	if err := p.check(ctx); err != nil {
		return kms.Wrap{}, err
	}
	var a keyAnswer
	err := p.call(ctx, request{
		op: op, path: "encrypt/" + p.key, items: 1,
		body: wrapInput{Plaintext: key, Context: binding.Encode()}, into: &a,
	})
	if err != nil {
		return kms.Wrap{}, err
	}
	return p.wrapped(op, a.Ciphertext)
}

// Unwrap decrypts the key in w.
func (p *Provider) Unwrap(ctx context.Context, binding kms.Context, w kms.Wrap) ([]byte, error) {
	const op = "unwrap"
	if err := binding.Validate(); err != nil {
		return nil, err
	}
	if err := p.own(op, w); err != nil {
		return nil, err
	}
	if err := p.check(ctx); err != nil {
		return nil, err
	}
	var a keyAnswer
	err := p.call(ctx, request{
		op: op, path: "decrypt/" + p.key, items: 1,
		body: ciphertextInput{Ciphertext: string(w.Blob), Context: binding.Encode()}, into: &a,
	})
	if err != nil {
		return nil, err
	}
	if a.Plaintext == nil {
		return nil, p.fail(op, kms.ErrUnavailable, "the answer holds no key")
	}
	if len(a.Plaintext) != kms.KeySize {
		clear(a.Plaintext)
		return nil, p.fail(op, kms.ErrMismatch, "the blob holds no key of 256 bits")
	}
	return a.Plaintext, nil
}

// Rewrap has Vault decrypt and encrypt anew, in batches of 500. When a batch
// fails after others have succeeded, its items and those after it have the
// error.
func (p *Provider) Rewrap(ctx context.Context, items []kms.RewrapItem) ([]kms.RewrapResult, error) {
	results := make([]kms.RewrapResult, len(items))
	var send []int // indices of what is worth sending
	for i, item := range items {
		err := item.Context.Validate()
		if err == nil {
			err = p.own("rewrap", item.Wrap)
		}
		if results[i].Err = err; err == nil {
			send = append(send, i)
		}
	}
	if len(send) == 0 {
		return results, nil
	}
	if err := p.check(ctx); err != nil {
		return nil, err
	}
	done := false
	for len(send) > 0 {
		batch := send[:min(len(send), maxBatch)]
		err := p.rewrapBatch(ctx, items, results, batch)
		if err != nil && !done {
			return nil, err
		}
		if err != nil {
			for _, i := range send {
				results[i].Err = err
			}
			break
		}
		done, send = true, send[len(batch):]
	}
	return results, nil
}

// rewrapBatch sends the items of the given indices and fills in their results.
func (p *Provider) rewrapBatch(ctx context.Context, items []kms.RewrapItem, results []kms.RewrapResult, batch []int) error {
	const op = "rewrap"
	in := batchInput{Items: make([]ciphertextInput, len(batch))}
	for n, i := range batch {
		in.Items[n] = ciphertextInput{Ciphertext: string(items[i].Wrap.Blob), Context: items[i].Context.Encode()}
	}
	var a batchAnswer
	err := p.call(ctx, request{op: op, path: "rewrap/" + p.key, items: len(batch), body: in, into: &a})
	if err != nil {
		return err
	}
	if len(a.Results) != len(batch) {
		return p.fail(op, kms.ErrUnavailable, "the answer has not as many results as the batch")
	}
	for n, i := range batch {
		r := a.Results[n]
		if r.Error != "" {
			v := classifyText(op, r.Error)
			results[i].Err = p.fail(op, v.class, v.detail)
			continue
		}
		results[i].Wrap, results[i].Err = p.wrapped(op, r.Ciphertext)
	}
	return nil
}

// wrapped checks a ciphertext that Vault returned and describes it.
func (p *Provider) wrapped(op, ciphertext string) (kms.Wrap, error) {
	v, ok := version(ciphertext)
	if !ok {
		return kms.Wrap{}, p.fail(op, kms.ErrUnavailable, "the answer holds no ciphertext")
	}
	return kms.Wrap{
		Provider: Name, Key: p.identity, Version: v,
		Blob: []byte(ciphertext), WrappedAt: time.Now().UTC(),
	}, nil
}

// own refuses what this key cannot have wrapped, without asking Vault.
func (p *Provider) own(op string, w kms.Wrap) error {
	switch v, ok := version(string(w.Blob)); {
	case w.Provider != Name || w.Key != p.identity:
		return p.fail(op, kms.ErrMismatch, "wrapped by another key")
	case !ok:
		return p.fail(op, kms.ErrMismatch, "the blob is no ciphertext of Vault")
	case v != w.Version:
		return p.fail(op, kms.ErrMismatch, "the blob has another version than the row says")
	default:
		return nil
	}
}

// version reads the N of vault:vN:BASE64.
func version(ciphertext string) (string, bool) {
	rest, ok := strings.CutPrefix(ciphertext, "vault:v")
	if !ok || len(ciphertext) > kms.MaxBlob {
		return "", false
	}
	v, blob, ok := strings.Cut(rest, ":")
	if n, err := strconv.Atoi(v); !ok || err != nil || n < 1 || strconv.Itoa(n) != v || blob == "" {
		return "", false
	}
	for i := range len(blob) {
		c := blob[i]
		if (c < 'A' || c > 'Z') && (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '+' && c != '/' && c != '=' {
			return "", false
		}
	}
	return v, true
}

// request is one call to the transit engine.
type request struct {
	op    string
	path  string // below the mount
	body  any    // nil reads, otherwise it is written as JSON
	into  any    // where the data of the answer go; nil wants none
	items int
	once  bool // not to be repeated when the outcome is unknown
}

// call makes a request, repeats it as the retry policy says, and logs in anew
// when it is refused.
func (p *Provider) call(ctx context.Context, r request) error {
	var body []byte
	if r.body != nil {
		var err error
		if body, err = json.Marshal(r.body); err != nil {
			return inputError(r.op, "cannot be written as JSON")
		}
		defer clear(body)
	}
	policy := p.retry
	if r.once {
		policy.Attempts = 1
	}
	return policy.Do(ctx, func(attempt context.Context) error {
		l, err := p.session.login(attempt)
		if err == nil {
			err = p.send(attempt, ctx, l, r, body)
		}
		if class := kms.Class(err); class == kms.ErrAccessDenied || class == kms.ErrUnauthenticated { //nolint:errorlint // Class returns the sentinels themselves
			if l != nil {
				err = p.sendAgain(attempt, ctx, l, r, body, err)
			}
		}
		return retry.Caused(ctx, err)
	})
}

// sendAgain repeats a refused request with a new login.
func (p *Provider) sendAgain(attempt, ctx context.Context, refused *login, r request, body []byte, err error) error {
	l, loginErr := p.session.loginAgain(attempt, refused)
	if loginErr != nil {
		return loginErr
	}
	if l == refused {
		return err
	}
	return p.send(attempt, ctx, l, r, body)
}

// send makes one HTTP request under the context of the attempt; ctx is the
// caller's.
func (p *Provider) send(attempt, ctx context.Context, l *login, r request, body []byte) error {
	start := time.Now()
	logical, path := l.client.Logical(), p.mount+"/"+r.path
	var resp *api.Response
	var err error
	if r.body == nil {
		resp, err = logical.ReadRawWithContext(attempt, path)
	} else {
		resp, err = logical.WriteRawWithContext(attempt, path, body)
	}
	var id string
	if err == nil {
		id, err = decode(resp, r.into)
	}
	if resp != nil {
		_ = resp.Body.Close()
	}
	if err != nil {
		v := classify(r.op, err)
		err = retry.Caused(ctx, p.fail(r.op, v.class, v.detail))
	}
	p.observe(ctx, kms.Call{
		Provider: Name, Key: p.identity, Operation: r.op, RequestID: id,
		Items: r.items, Duration: time.Since(start), Err: err,
	})
	return err
}

var errNotJSON = errors.New("answer is not what transit answers")

// decode reads an answer of Vault and zeroes what it read, for it may hold a
// key.
func decode(resp *api.Response, into any) (requestID string, err error) {
	raw, err := io.ReadAll(resp.Body)
	defer func() { clear(raw[:cap(raw)]) }()
	if err != nil {
		return "", err
	}
	if into == nil {
		return "", nil // 204, or the key as it is now
	}
	if kind, _, err := mime.ParseMediaType(resp.Header.Get("Content-Type")); err != nil || kind != "application/json" {
		return "", errNotJSON
	}
	var answer struct {
		RequestID string         `json:"request_id"`
		Data      jsontext.Value `json:"data"`
	}
	defer func() { clear(answer.Data) }()
	if err := json.Unmarshal(raw, &answer); err != nil || answer.Data.Kind() != jsontext.KindBeginObject {
		return "", errNotJSON
	}
	if err := json.Unmarshal(answer.Data, into); err != nil {
		return "", errNotJSON
	}
	return retry.RequestID(answer.RequestID), nil
}
