package auth

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func sha(token string) string { return fmt.Sprintf("sha256:%x", sha256.Sum256([]byte(token))) }

func TestOperators(t *testing.T) {
	dir := t.TempDir()
	tokens := map[string]string{"ann": NewOperatorToken(), "bob": NewOperatorToken(), "c.d-e_9": NewOperatorToken()}
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
	token := write("bob.token", tokens["bob"]+"\n", 0o600)
	open := write("open.token", NewOperatorToken(), 0o644)
	good := "# those on call\n\nann: " + sha(tokens["ann"]) + "\r\n  bob : file:bob.token\nc.d-e_9: " + sha(tokens["c.d-e_9"])
	var all Operators
	if err := all.Load(write("operators", good, 0o600)); err != nil {
		t.Fatal(err)
	}
	for name, token := range tokens {
		if got, ok := all.Identify(token); !ok || got != name {
			t.Errorf("%s is taken for %q", name, got)
		}
		for _, other := range []string{"", token[:len(token)-1], token + "x", sha(token), name} {
			if got, ok := all.Identify(other); ok || got != "" {
				t.Errorf("%q is taken for %q", other, got)
			}
		}
	}
	if _, ok := (Operators{}).Identify(""); ok {
		t.Error("nobody is known, and one is found")
	}
	if s := fmt.Sprintf("%v %+v", all, all); strings.Contains(s, sha(tokens["ann"])[7:]) {
		t.Errorf("prints as %s", s)
	}
	a := sha(tokens["ann"])
	for name, c := range map[string]struct {
		content string
		mode    os.FileMode
		want    error
	}{
		"group may read":       {good, 0o640, ErrSecretExposed},
		"all may read":         {good, 0o604, ErrSecretExposed},
		"a token file is open": {"x: file:" + open, 0o600, ErrSecretExposed},
		"name twice":           {"ann: " + a + "\nann: " + sha("x"), 0o600, ErrSecretFile},
		"token twice":          {"ann: " + a + "\nbob: " + a, 0o600, ErrSecretFile},
		"token twice, by file": {"ann: " + sha(tokens["bob"]) + "\nbob: file:" + token, 0o600, ErrSecretFile},
		"no name":              {": " + a, 0o600, ErrSecretFile},
		"name with a colon":    {"operator:ann: " + a, 0o600, ErrSecretFile},
		"name in capitals":     {"Ann: " + a, 0o600, ErrSecretFile},
		"long name":            {strings.Repeat("a", 33) + ": " + a, 0o600, ErrSecretFile},
		"no value":             {"ann:", 0o600, ErrSecretFile},
		"short hash":           {"ann: " + a[:60], 0o600, ErrSecretFile},
		"no hash":              {"ann: sha256:" + strings.Repeat("g", 64), 0o600, ErrSecretFile},
		"the token itself":     {"ann: " + tokens["ann"], 0o600, ErrSecretFile},
		"missing file":         {"ann: file:none", 0o600, ErrSecretFile},
	} {
		t.Run(name, func(t *testing.T) {
			var o Operators
			err := o.Load(write("refused", c.content, c.mode))
			if !errors.Is(err, c.want) {
				t.Fatalf("got %v, want %v", err, c.want)
			}
			if strings.Contains(err.Error(), a[7:]) || strings.Contains(err.Error(), tokens["ann"]) {
				t.Errorf("the error holds the hash, or the token: %v", err)
			}
		})
	}
}

// FuzzOperators: what is taken as an operator's line names one, and knows the
// token that the line is of.
func FuzzOperators(f *testing.F) {
	for _, line := range []string{"ann: " + sha("x"), "ann:" + sha(""), "a.b: file:x", "ann: sha256:", ": x", "ann", "# no", "ann: ../x"} {
		f.Add(line)
	}
	dir := f.TempDir() // holds no file
	f.Fuzz(func(t *testing.T, line string) {
		var o Operators
		if o.load(dir, line) != nil {
			return
		}
		if len(o.known) != 1 || !operatorName.MatchString(o.known[0].name) || !o.known[0].set {
			t.Errorf("%q made %d operators", line, len(o.known))
		}
	})
}
