package signing_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/cofferdb/coffer/cmd/coffer/internal/signing"
	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/kms/kmstest"
	"github.com/cofferdb/coffer/kms/local"
)

type text struct {
	Says string `json:"says"`
}

func keyring(t *testing.T, rows kms.Rows, keyFile string) *kms.Keyring {
	t.Helper()
	provider, err := local.Open(t.Context(), local.Options{Path: keyFile, Create: true, Region: "eu"})
	if err != nil {
		t.Fatal(err)
	}
	k, err := kms.NewKeyring(kms.Config{Region: "eu", Provider: provider, Rows: rows})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = k.Close() })
	return k
}

// TestKey: one key of a region, for all its processes and after a restart, which
// is not in its row in clear.
func TestKey(t *testing.T) {
	rows, sealed, file := kmstest.NewRows(), kmstest.NewRows(), t.TempDir()+"/key"
	first := signing.New(rows, keyring(t, sealed, file))
	signed, err := first.Sign(t.Context(), "kind", text{"hello"})
	if err != nil {
		t.Fatal(err)
	}
	second := signing.New(rows, keyring(t, sealed, file))
	var got text
	if err := second.Verify(t.Context(), "kind", signed, &got); err != nil || got.Says != "hello" {
		t.Errorf("%+v %v", got, err)
	}
	one, err := first.Public(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	two, err := second.Public(t.Context())
	if err != nil || one.KeyID != two.KeyID || !one.IsPublic() || one.KeyID == "" {
		t.Errorf("%v and %v, %v", one.KeyID, two.KeyID, err)
	}
	cut := strings.Split(signed, ".")
	for what, forged := range map[string]string{
		"another kind":  mustSign(t, first, "other"),
		"another key":   mustSign(t, signing.New(kmstest.NewRows(), keyring(t, kmstest.NewRows(), t.TempDir()+"/key")), "kind"),
		"no signature":  cut[0] + "." + cut[1] + ".",
		"another text":  cut[0] + "." + strings.Split(mustSign(t, first, "kind"), ".")[1] + "A." + cut[2],
		"nothing":       "",
		"no algorithm":  "eyJhbGciOiJub25lIn0." + cut[1] + ".",
		"one more part": signed + ".AAAA",
	} {
		if err := first.Verify(t.Context(), "kind", forged, &got); !errors.Is(err, signing.ErrSignature) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func mustSign(t *testing.T, k *signing.Key, kind string) string {
	t.Helper()
	signed, err := k.Sign(t.Context(), kind, text{"more"})
	if err != nil {
		t.Fatal(err)
	}
	return signed
}

// TestDamagedRow: a row that was changed is not used.
func TestDamagedRow(t *testing.T) {
	for _, value := range []string{"{", `{"version":2}`, `{"version":1,"public":"","private":""}`} {
		rows := kmstest.NewRows()
		if _, err := rows.Create(t.Context(), "signing", []byte(value)); err != nil {
			t.Fatal(err)
		}
		if _, err := signing.New(rows, keyring(t, kmstest.NewRows(), t.TempDir()+"/key")).Public(t.Context()); err == nil {
			t.Errorf("%s is used", value)
		}
	}
}
