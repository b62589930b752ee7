package awskms_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/kms/awskms"
)

func TestRotateWhileWrapping(t *testing.T) {
	f := newFake("eu-west-2")
	f.lag = 3
	front := newFront(t, f)
	p := open(t, options(front.URL, f.arn(f.create()), ""))
	var done atomic.Bool
	var group sync.WaitGroup
	for range 4 {
		group.Go(func() {
			var kept []kms.Wrap
			var keys [][]byte
			for i := 0; !done.Load(); i++ {
				key, w, err := p.Generate(t.Context(), binding)
				if err != nil {
					t.Error(err)
					return
				}
				kept, keys = append(kept, w), append(keys, key)
				got, err := p.Unwrap(t.Context(), binding, kept[i/2])
				if err != nil || !bytes.Equal(got, keys[i/2]) {
					t.Errorf("another key, or %v", err)
					return
				}
			}
		})
	}
	seen := map[string]bool{}
	for range 25 {
		version, err := p.Rotate(t.Context())
		must(t, err)
		seen[version] = true
	}
	if _, err := p.Rotate(t.Context()); !errors.Is(err, kms.ErrQuota) {
		t.Errorf("the 26th rotation: %v, want ErrQuota", err)
	}
	done.Store(true)
	group.Wait()
	if len(seen) != 25 {
		t.Errorf("25 rotations gave %d versions", len(seen))
	}
	// Wrap learns the version from what else was heard last, which may have been an
	// answer of before the last rotation that came late.
	_, _, err := p.Generate(t.Context(), binding)
	must(t, err)
	w, err := p.Wrap(t.Context(), binding, make([]byte, kms.KeySize))
	must(t, err)
	d, err := p.Describe(t.Context())
	must(t, err)
	if !seen[w.Version] || w.Version != d.Version {
		t.Errorf("wrapped with version %q, described as %q", w.Version, d.Version)
	}
}

// What retiring a version is to others, disabling the key is here; it succeeds
// only once KMS shows it.
func TestDisableConfirms(t *testing.T) {
	f := newFake("eu-west-2")
	front := newFront(t, f)
	p := open(t, options(front.URL, f.arn(f.create()), ""))
	_, w, err := p.Generate(t.Context(), binding)
	must(t, err)
	if err := p.Retire(t.Context(), w.Version); !errors.Is(err, kms.ErrInput) || !strings.Contains(err.Error(), "disable") {
		t.Errorf("Retire: %v, want it to say what to do instead", err)
	}
	f.set(func() { f.lag = 100 })
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if err := p.Disable(ctx); !errors.Is(err, kms.ErrUnavailable) {
		t.Errorf("while KMS does not show it: %v, want ErrUnavailable", err)
	}
	f.set(func() { f.lag = 0 })
	must(t, p.Disable(t.Context()))
	if _, err := p.Unwrap(t.Context(), binding, w); !errors.Is(err, kms.ErrDisabled) {
		t.Errorf("disabled: %v, want ErrDisabled", err)
	}
}

// States that KMS names only by DescribeKey.
func TestInvalidStates(t *testing.T) {
	for state, class := range map[string]error{
		"PendingDeletion": kms.ErrPendingDeletion, "PendingReplicaDeletion": kms.ErrPendingDeletion,
		"PendingImport": kms.ErrDisabled, "Unavailable": kms.ErrUnavailable, "Updating": kms.ErrUnavailable,
	} {
		f := newFake("eu-west-2")
		k := f.create()
		front := newFront(t, f)
		o := options(front.URL, f.arn(k), "")
		o.Attempts = 1
		p := open(t, o)
		_, w, err := p.Generate(t.Context(), binding)
		must(t, err)
		f.set(func() { k.state = state })
		for op, do := range operations(t, p, w) {
			if op == "describe" || op == "disable" {
				continue
			}
			if err := do(); !errors.Is(err, class) {
				t.Errorf("%s in state %s: %v, want %v", op, state, err, class)
			}
		}
	}
}

// The key must be where the region is: by its name before anything is sent, and
// by KMS's own word before it is used.
func TestResidency(t *testing.T) {
	const id = "key/01234567-89ab-cdef-0123-456789abcdef"
	isolate(t)
	for name, o := range map[string]awskms.Options{
		"another region":          {Key: "arn:aws:kms:us-east-1:111122223333:" + id, Region: "eu-west-2"},
		"alias of another region": {Key: "arn:aws:kms:us-east-1:111122223333:alias/coffer", Region: "eu-west-2"},
		"another partition":       {Key: "arn:aws:kms:cn-north-1:111122223333:" + id, Region: "cn-north-1"},
		"China's ARN elsewhere":   {Key: "arn:aws-cn:kms:eu-west-2:111122223333:" + id, Region: "eu-west-2"},
		"multi-region ARN":        {Key: "arn:aws:kms:eu-west-2:111122223333:key/mrk-0123456789abcdef0123456789abcdef"},
		"multi-region id":         {Key: "mrk-0123456789abcdef0123456789abcdef", Region: "eu-west-2"},
		"another service":         {Key: "arn:aws:s3:eu-west-2:111122223333:" + id},
	} {
		p, err := awskms.New(t.Context(), o)
		if err == nil {
			_ = p.Close()
			t.Errorf("%s was accepted", name)
			continue
		}
		if !errors.Is(err, kms.ErrMismatch) {
			t.Errorf("%s: %v, want ErrMismatch", name, err)
		}
	}

	f := newFake("cn-north-1")
	k := f.create()
	f.aliases["alias/coffer-cn"] = k.id
	front := newFront(t, f)
	p := open(t, options(front.URL, "alias/coffer-cn", "cn-north-1"))
	_, w, err := p.Generate(t.Context(), binding)
	must(t, err)
	if !strings.HasPrefix(w.Key, "arn:aws-cn:kms:cn-north-1:") {
		t.Errorf("the wrap names %s", w.Key)
	}
}

// What an alias leads to is known only once KMS says it.
func TestAliasLeadsElsewhere(t *testing.T) {
	for name, change := range map[string]func(*fake, *fakeKey){
		"another region": func(f *fake, _ *fakeKey) { f.region = "eu-central-1" },
		"multi-region":   func(_ *fake, k *fakeKey) { k.multi = true },
		"mrk-":           func(_ *fake, k *fakeKey) { k.id = "mrk-0123456789abcdef0123456789abcdef" },
		"signing key":    func(_ *fake, k *fakeKey) { k.usage, k.spec = "SIGN_VERIFY", "RSA_2048" },
		"a MAC key":      func(_ *fake, k *fakeKey) { k.usage, k.spec = "GENERATE_VERIFY_MAC", "HMAC_256" },
	} {
		f := newFake("eu-west-2")
		k := f.create()
		f.aliases["alias/coffer-eu"] = k.id
		change(f, k)
		front := newFront(t, f)
		p := open(t, options(front.URL, "alias/coffer-eu", "eu-west-2"))
		for op, do := range operations(t, p, kms.Wrap{Provider: awskms.Name, Key: f.arn(k), Version: "1", Blob: []byte("x")}) {
			if err := do(); !errors.Is(err, kms.ErrMismatch) && !errors.Is(err, kms.ErrNotFound) {
				t.Errorf("%s, %s: %v, want it refused", name, op, err)
			}
		}
		if n := front.requests.Load(); n != int64(len(operations(t, p, kms.Wrap{}))) {
			t.Errorf("%s: %d requests, want DescribeKey alone each time", name, n)
		}
	}
}

// An alias that moves changes nothing for a process that runs.
func TestAliasIsPinned(t *testing.T) {
	f := newFake("eu-west-2")
	first, second := f.create(), f.create()
	f.aliases["alias/coffer-eu"] = first.id
	front := newFront(t, f)
	p := open(t, options(front.URL, "alias/coffer-eu", "eu-west-2"))
	_, w, err := p.Generate(t.Context(), binding)
	must(t, err)
	f.set(func() { f.aliases["alias/coffer-eu"] = second.id })
	_, again, err := p.Generate(t.Context(), binding)
	must(t, err)
	d, err := p.Describe(t.Context())
	must(t, err)
	if w.Key != f.arn(first) || again.Key != w.Key || d.Key != w.Key {
		t.Errorf("keys %s, %s, %s; want the first throughout", w.Key, again.Key, d.Key)
	}
	q := open(t, options(front.URL, "alias/coffer-eu", "eu-west-2"))
	if _, err := q.Unwrap(t.Context(), binding, w); !errors.Is(err, kms.ErrMismatch) {
		t.Errorf("another process: %v, want ErrMismatch", err)
	}
}

func TestRewrapStopsWhenTheServiceFails(t *testing.T) {
	f := newFake("eu-west-2")
	front := newFront(t, f)
	o := options(front.URL, f.arn(f.create()), "")
	o.Attempts, o.Concurrency = 1, 4
	p := open(t, o)
	items := make([]kms.RewrapItem, 500)
	for i := range items {
		c := kms.Context{Region: "eu", App: strconv.Itoa(i), Purpose: kms.PurposeApp}
		_, w, err := p.Generate(t.Context(), c)
		must(t, err)
		items[i] = kms.RewrapItem{Context: c, Wrap: w}
	}
	var n atomic.Int64
	front.set(func(w http.ResponseWriter, r *http.Request) {
		if n.Add(1) > 100 {
			answering(400, "AccessDeniedException")(w, r)
			return
		}
		f.ServeHTTP(w, r)
	})
	results, err := p.Rewrap(t.Context(), items)
	must(t, err)
	var done int
	for _, r := range results {
		if r.Err == nil {
			done++
		} else if !errors.Is(r.Err, kms.ErrAccessDenied) {
			t.Fatal(r.Err)
		}
	}
	if done != 100 || n.Load() > 104 {
		t.Errorf("%d done with %d requests, want 100 and at most 104", done, n.Load())
	}
	if _, err := p.Rewrap(t.Context(), items); !errors.Is(err, kms.ErrAccessDenied) {
		t.Errorf("nothing done: %v, want ErrAccessDenied of the whole call", err)
	}
	front.set(nil)
	results, err = p.Rewrap(t.Context(), items)
	must(t, err)
	for i, r := range results {
		must(t, r.Err)
		if _, err := p.Unwrap(t.Context(), items[i].Context, r.Wrap); err != nil {
			t.Fatalf("item %d: %v", i, err)
		}
	}
}

// The SDK's own retries are off, also when the environment asks for them.
func TestRetriesAreOurs(t *testing.T) {
	t.Setenv("AWS_MAX_ATTEMPTS", "10")
	t.Setenv("AWS_RETRY_MODE", "adaptive")
	f := newFake("eu-west-2")
	front := newFront(t, f)
	o := options(front.URL, f.arn(f.create()), "")
	var seen calls
	o.Observe = seen.observe
	p := open(t, o)
	_, w, err := p.Generate(t.Context(), binding)
	must(t, err)
	for code, want := range map[string]int64{"ThrottlingException": 4, "LimitExceededException": 1, "AccessDeniedException": 1, "KMSInternalException": 4} {
		before := front.requests.Load()
		front.set(answering(400, code))
		if _, err := p.Unwrap(t.Context(), binding, w); err == nil {
			t.Errorf("%s: no error", code)
		}
		if n := front.requests.Load() - before; n != want {
			t.Errorf("%s: %d requests, want %d", code, n, want)
		}
		front.set(nil)
	}
	for _, call := range seen.all() {
		if call.RequestID == "" {
			t.Errorf("%s has no request id", call.Operation)
		}
	}
	// A rotation whose answer is lost is not repeated.
	var rotations atomic.Int64
	front.set(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasSuffix(r.Header.Get("X-Amz-Target"), "RotateKeyOnDemand") {
			rotations.Add(1)
			answering(500, "KMSInternalException")(w, r)
			return
		}
		f.ServeHTTP(w, r)
	})
	if _, err := p.Rotate(t.Context()); !errors.Is(err, kms.ErrUnavailable) || rotations.Load() != 1 {
		t.Errorf("%v after %d requests, want ErrUnavailable after one", err, rotations.Load())
	}
}

func TestConnectionRefused(t *testing.T) {
	f := newFake("eu-west-2")
	front := newFront(t, f)
	o := options(front.URL, f.arn(f.create()), "")
	o.Attempts = 1
	p := open(t, o)
	_, w, err := p.Generate(t.Context(), binding)
	must(t, err)
	front.Close()
	for op, do := range operations(t, p, w) {
		if err := do(); !errors.Is(err, kms.ErrUnavailable) || !kms.Retryable(err) {
			t.Errorf("%s: %v, want ErrUnavailable", op, err)
		}
	}
}

func TestCredentials(t *testing.T) {
	f := newFake("eu-west-2")
	front := newFront(t, f)
	arn := f.arn(f.create())

	t.Run("none", func(t *testing.T) {
		o := options(front.URL, arn, "")
		o.Credentials = nil
		for _, name := range []string{"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_ROLE_ARN"} {
			t.Setenv(name, "")
		}
		p := open(t, o)
		if _, err := p.Describe(t.Context()); !errors.Is(err, kms.ErrUnauthenticated) {
			t.Errorf("%v, want ErrUnauthenticated", err)
		}
	})
	t.Run("from the environment", func(t *testing.T) {
		o := options(front.URL, arn, "")
		o.Credentials = nil
		isolate(t)
		t.Setenv("AWS_ACCESS_KEY_ID", "AKIDENV")
		t.Setenv("AWS_SECRET_ACCESS_KEY", secretKey)
		p, err := awskms.New(t.Context(), o)
		must(t, err)
		defer p.Close()
		_, _, err = p.Generate(t.Context(), binding)
		must(t, err)
	})
	t.Run("from a profile", func(t *testing.T) {
		o := options(front.URL, arn, "")
		o.Credentials, o.Profile = nil, "coffer"
		isolate(t)
		file := filepath.Join(t.TempDir(), "credentials")
		must(t, os.WriteFile(file, []byte("[coffer]\naws_access_key_id=AKIDPROFILE\naws_secret_access_key="+secretKey+"\n"), 0o600))
		t.Setenv("AWS_SHARED_CREDENTIALS_FILE", file)
		t.Setenv("AWS_ACCESS_KEY_ID", "")
		t.Setenv("AWS_SECRET_ACCESS_KEY", "")
		p, err := awskms.New(t.Context(), o)
		must(t, err)
		defer p.Close()
		_, _, err = p.Generate(t.Context(), binding)
		must(t, err)
		o.Profile = "nobody"
		if q, err := awskms.New(t.Context(), o); err == nil {
			_ = q.Close()
			t.Error("a profile that does not exist was accepted")
		}
	})
	t.Run("refused once", func(t *testing.T) {
		s := &source{}
		s.set("AKIDOLD", nil)
		o := options(front.URL, arn, "")
		o.Credentials = s
		p := open(t, o)
		_, w, err := p.Generate(t.Context(), binding)
		must(t, err)
		f.set(func() { f.refused["AKIDOLD"] = true })
		if _, err := p.Unwrap(t.Context(), binding, w); !errors.Is(err, kms.ErrUnauthenticated) {
			t.Errorf("old credentials: %v, want ErrUnauthenticated", err)
		}
		s.set("AKIDNEW", nil)
		_, err = p.Unwrap(t.Context(), binding, w)
		must(t, err)
	})
	t.Run("source out of order", func(t *testing.T) {
		s := &source{}
		s.set("", fmt.Errorf("asking %s: %w", canary, context.DeadlineExceeded))
		o := options(front.URL, arn, "")
		o.Credentials, o.Attempts = s, 1
		p := open(t, o)
		_, err := p.Describe(t.Context())
		if !errors.Is(err, kms.ErrUnavailable) || strings.Contains(err.Error(), canary) {
			t.Errorf("%v, want ErrUnavailable without the source's words", err)
		}
	})
}

// Neither credentials nor keys may be in a log line or an error.
func TestLogsAndErrorsHoldNoSecret(t *testing.T) {
	f := newFake("eu-west-2")
	front := newFront(t, f)
	var log bytes.Buffer
	o := options(front.URL, f.arn(f.create()), "")
	o.Log = slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	o.Attempts = 1
	var seen calls
	o.Observe = seen.observe
	p := open(t, o)
	key, w, err := p.Generate(t.Context(), binding)
	must(t, err)
	front.set(answering(400, "AccessDeniedException"))
	_, denied := p.Unwrap(t.Context(), binding, w)
	front.set(raw(200, "application/x-amz-json-1.1", `{"Plaintext":"`+canary))
	_, malformed := p.Unwrap(t.Context(), binding, w)
	text := fmt.Sprintf("%s %v %+v %v %+v %+v", log.String(), denied, denied, malformed, malformed, seen.all())
	for name, hidden := range map[string]string{
		"the secret access key": secretKey, "the service's text": canary,
		"the key": base64.StdEncoding.EncodeToString(key), "the blob": base64.StdEncoding.EncodeToString(w.Blob),
	} {
		if strings.Contains(text, hidden) {
			t.Errorf("%s shows in %s", name, text)
		}
	}
}

func TestCloseEndsRequests(t *testing.T) {
	f := newFake("eu-west-2")
	front := newFront(t, f)
	o := options(front.URL, f.arn(f.create()), "")
	o.Timeout, o.Attempts = time.Hour, 1
	p := open(t, o)
	_, w, err := p.Generate(t.Context(), binding)
	must(t, err)
	arrived := make(chan struct{})
	front.set(func(_ http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		close(arrived)
		<-r.Context().Done()
	})
	done := make(chan error, 1)
	go func() { _, err := p.Unwrap(t.Context(), binding, w); done <- err }()
	<-arrived
	must(t, p.Close())
	if err := <-done; !errors.Is(err, kms.ErrUnavailable) {
		t.Errorf("%v, want ErrUnavailable", err)
	}
}
