package auth

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestOperator(t *testing.T) {
	token := NewOperatorToken()
	path := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(path, []byte(token+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	operator, err := LoadOperator(path)
	if err != nil {
		t.Fatal(err)
	}
	if !operator.Matches(token) {
		t.Error("its own token does not match")
	}
	for _, other := range []string{"", token[:len(token)-1], token + "x", NewOperatorToken(), token + "\n"} {
		if operator.Matches(other) {
			t.Errorf("%q matches", other)
		}
	}
	if (Operator{}).Matches("") || (Operator{}).Matches("\x00") {
		t.Error("the zero value matches")
	}
	for _, s := range []string{fmt.Sprint(operator), fmt.Sprintf("%+v", operator), operator.LogValue().String()} {
		if s != "[redacted]" {
			t.Errorf("prints as %q", s)
		}
	}
}

func TestSecretFiles(t *testing.T) {
	dir := t.TempDir()
	write := func(name, content string, mode os.FileMode) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		return path
	}
	secret := strings.Repeat("s", 40)
	for _, c := range []struct {
		name, path string
		want       error
	}{
		{"owner only", write("a", secret, 0o600), nil},
		{"read-only", write("b", secret+"\r\n", 0o400), nil},
		{"group", write("c", secret, 0o640), ErrSecretExposed},
		{"others", write("d", secret, 0o604), ErrSecretExposed},
		{"group may write", write("e", secret, 0o620), ErrSecretExposed},
		{"missing", filepath.Join(dir, "none"), ErrSecretFile},
		{"folder", dir, ErrSecretFile},
		{"empty", write("f", "", 0o600), ErrSecretFile},
		{"only a line end", write("g", "\n", 0o600), ErrSecretFile},
		{"two lines", write("h", secret+"\n"+secret, 0o600), ErrSecretFile},
		{"short", write("i", "short", 0o600), ErrSecretFile},
		{"huge", write("j", strings.Repeat("s", maxSecretFile+1), 0o600), ErrSecretFile},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := LoadOperator(c.path)
			if !errors.Is(err, c.want) {
				t.Fatalf("got %v, want %v", err, c.want)
			}
			if err != nil && strings.Contains(err.Error(), secret) {
				t.Error("the error holds the secret")
			}
		})
	}
}
