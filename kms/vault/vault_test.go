package vault_test

import (
	"bytes"
	"errors"
	"strconv"
	"testing"

	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/kms/vault"
)

func TestRoundTripWithTheSmallestPolicy(t *testing.T) {
	s := newServer(t)
	var seen calls
	o := s.options()
	o.Observe = seen.observe
	p := open(t, o)
	ctx := t.Context()

	key, w, err := p.Generate(ctx, binding)
	must(t, err)
	if len(key) != kms.KeySize || w.Provider != vault.Name || w.Version != "1" {
		t.Fatalf("key of %d bytes, wrap %v", len(key), w)
	}
	got, err := p.Unwrap(ctx, binding, w)
	must(t, err)
	if !bytes.Equal(got, key) {
		t.Fatal("unwrapped another key")
	}
	again, err := p.Wrap(ctx, binding, key)
	must(t, err)
	if bytes.Equal(again.Blob, w.Blob) {
		t.Fatal("wrapping is deterministic")
	}
	got, err = p.Unwrap(ctx, binding, again)
	must(t, err)
	if !bytes.Equal(got, key) {
		t.Fatal("unwrapped another key")
	}
	d, err := p.Describe(ctx)
	must(t, err)
	if d.Identity() != w.Identity() || d.Version != "1" || d.MinVersion != "1" || d.State != kms.StateEnabled || !d.NativeRewrap {
		t.Fatalf("description %+v", d)
	}
	for _, other := range []kms.Context{
		{Region: "us", App: binding.App, Purpose: binding.Purpose},
		{Region: binding.Region, App: "03ab", Purpose: binding.Purpose},
		{Region: binding.Region, App: binding.App, Purpose: "tag-key"},
		{Region: "eu0", App: "3aa", Purpose: binding.Purpose},
	} {
		if _, err := p.Unwrap(ctx, other, w); !errors.Is(err, kms.ErrMismatch) {
			t.Errorf("context %+v: %v, want ErrMismatch", other, err)
		}
	}
	for _, op := range []string{"login", "describe", "generate", "wrap", "unwrap"} {
		of := seen.of(op)
		if len(of) == 0 {
			t.Errorf("%s was not observed", op)
			continue
		}
		for _, call := range of {
			if call.Err == nil && len(call.RequestID) != 36 {
				t.Errorf("%s has request id %q", op, call.RequestID)
			}
		}
	}
	if n := len(seen.of("login")); n != 1 {
		t.Errorf("%d logins, want one", n)
	}
	if _, err := p.Rotate(ctx); !errors.Is(err, kms.ErrAccessDenied) {
		t.Errorf("rotating with the server's policy: %v, want ErrAccessDenied", err)
	}
}

func TestRewrapKeepsOrderAndErrors(t *testing.T) {
	s := newServer(t)
	var seen calls
	o := s.tokenOptions("coffer", "coffer-operator")
	o.Observe = seen.observe
	p := open(t, o)
	ctx := t.Context()
	const n = 1203
	items := make([]kms.RewrapItem, n)
	keys := make([][]byte, n)
	context := func(i int) kms.Context {
		return kms.Context{Region: "eu", App: strconv.Itoa(i), Purpose: kms.PurposeApp}
	}
	for i := range items {
		key, w, err := p.Generate(ctx, context(i))
		must(t, err)
		keys[i], items[i] = key, kms.RewrapItem{Context: context(i), Wrap: w}
	}
	items[7].Context = context(8)
	items[600].Wrap.Blob = bytes.Replace(items[600].Wrap.Blob, []byte("vault:v1:"), []byte("vault:v1:AAAA"), 1)
	items[601].Wrap.Blob = []byte("rubbish")
	items[1202].Wrap.Key = "elsewhere/transit/coffer-eu"
	version, err := p.Rotate(ctx)
	must(t, err)
	if version != "2" {
		t.Fatalf("rotated to %q", version)
	}
	results, err := p.Rewrap(ctx, items)
	must(t, err)
	if len(results) != n {
		t.Fatalf("%d results", len(results))
	}
	for i, r := range results {
		if i == 7 || i == 600 || i == 601 || i == 1202 {
			if !errors.Is(r.Err, kms.ErrMismatch) {
				t.Errorf("item %d: %v, want ErrMismatch", i, r.Err)
			}
			continue
		}
		if r.Err != nil || r.Wrap.Version != "2" {
			t.Fatalf("item %d: %v, %v", i, r.Wrap, r.Err)
		}
		if i%200 == 0 {
			got, err := p.Unwrap(ctx, context(i), r.Wrap)
			must(t, err)
			if !bytes.Equal(got, keys[i]) {
				t.Fatalf("item %d has another key", i)
			}
		}
	}
	var sizes []int
	for _, call := range seen.of("rewrap") {
		sizes = append(sizes, call.Items)
	}
	if len(sizes) != 3 || sizes[0] != 500 || sizes[1] != 500 || sizes[2] != 201 {
		t.Errorf("batches of %v, want 500, 500, 201", sizes)
	}
}

func TestRetireConfirms(t *testing.T) {
	for _, trim := range []bool{false, true} {
		t.Run("trim="+strconv.FormatBool(trim), func(t *testing.T) {
			s := newServer(t)
			o := s.tokenOptions("coffer", "coffer-operator")
			o.Trim = trim
			p := open(t, o)
			ctx := t.Context()
			key, first, err := p.Generate(ctx, binding)
			must(t, err)
			_, err = p.Rotate(ctx)
			must(t, err)
			second, err := p.Wrap(ctx, binding, key)
			must(t, err)
			if second.Version != "2" {
				t.Fatalf("wrapped with version %q after the rotation", second.Version)
			}
			if _, err := p.Unwrap(ctx, binding, first); err != nil {
				t.Fatalf("old version after the rotation: %v", err)
			}
			if err := p.Retire(ctx, "3"); !errors.Is(err, kms.ErrNotFound) {
				t.Fatalf("retiring everything: %v, want ErrNotFound", err)
			}
			must(t, p.Retire(ctx, "2"))
			must(t, p.Retire(ctx, "2"))
			must(t, p.Retire(ctx, "1")) // never lowers a minimum
			d, err := p.Describe(ctx)
			must(t, err)
			if d.Version != "2" || d.MinVersion != "2" {
				t.Fatalf("description %+v", d)
			}
			if _, err := p.Unwrap(ctx, binding, first); !errors.Is(err, kms.ErrVersionRetired) {
				t.Fatalf("retired version: %v, want ErrVersionRetired", err)
			}
			results, err := p.Rewrap(ctx, []kms.RewrapItem{{Context: binding, Wrap: first}, {Context: binding, Wrap: second}})
			must(t, err)
			if !errors.Is(results[0].Err, kms.ErrVersionRetired) || results[1].Err != nil {
				t.Fatalf("rewrapping: %v, %v", results[0].Err, results[1].Err)
			}
			got, err := p.Unwrap(ctx, binding, second)
			must(t, err)
			if !bytes.Equal(got, key) {
				t.Fatal("another key")
			}
			available := s.read("transit/keys/coffer-eu")["min_available_version"]
			if want := map[bool]string{false: "0", true: "2"}[trim]; asText(available) != want {
				t.Errorf("min_available_version is %v, want %s", available, want)
			}
		})
	}
}

// The version in a row decides whether a version may be retired, so it has to be
// that of the blob.
func TestVersionInTheRow(t *testing.T) {
	s := newServer(t)
	p := open(t, s.options())
	_, w, err := p.Generate(t.Context(), binding)
	must(t, err)
	for _, version := range []string{"", "0", "2", "01"} {
		w.Version = version
		if _, err := p.Unwrap(t.Context(), binding, w); !errors.Is(err, kms.ErrMismatch) {
			t.Errorf("version %q: %v, want ErrMismatch", version, err)
		}
	}
}
