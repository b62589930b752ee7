package vault_test

import (
	"encoding/base64"
	"testing"

	"github.com/cofferdb/coffer/kms"
)

// Against a real Vault on the same machine: what one request costs, of ours and
// of the client library by itself.
func BenchmarkUnwrap(b *testing.B) {
	s := newServer(b)
	p := open(b, s.options())
	_, w, err := p.Generate(b.Context(), binding)
	must(b, err)
	for b.Loop() {
		if _, err := p.Unwrap(b.Context(), binding, w); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkRewrap500(b *testing.B) {
	s := newServer(b)
	p := open(b, s.options())
	_, w, err := p.Generate(b.Context(), binding)
	must(b, err)
	items := make([]kms.RewrapItem, 500)
	raw := make([]map[string]any, len(items))
	for i := range items {
		items[i] = kms.RewrapItem{Context: binding, Wrap: w}
		raw[i] = map[string]any{"ciphertext": string(w.Blob), "context": base64.StdEncoding.EncodeToString(binding.Encode())}
	}
	b.Run("coffer", func(b *testing.B) {
		for b.Loop() {
			if _, err := p.Rewrap(b.Context(), items); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("client library", func(b *testing.B) {
		for b.Loop() {
			if _, err := s.admin.Logical().WriteWithContext(b.Context(), "transit/rewrap/coffer-eu", map[string]any{"batch_input": raw}); err != nil {
				b.Fatal(err)
			}
		}
	})
}
