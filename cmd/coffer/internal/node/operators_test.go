package node

import (
	"fmt"
	"strings"
	"testing"

	"github.com/cofferdb/coffer/cmd/coffer/internal/auth"
)

// TestNamedOperators: the audit log names who of the operators did what.
func TestNamedOperators(t *testing.T) {
	checkLeaks(t)
	cfg := plain(production(t, ""))
	ann := auth.NewOperatorToken()
	operator, err := auth.NewOperator(ann)
	if err != nil {
		t.Fatal(err)
	}
	if err := cfg.Operators.Add("ann", operator); err != nil {
		t.Fatal(err)
	}
	shared, err := auth.ReadSecret(cfg.OperatorTokenFile)
	if err != nil {
		t.Fatal(err)
	}
	p, err := Open(t.Context(), cfg, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := p.Close(t.Context()); err != nil {
			t.Error(err)
		}
	}()
	for name, token := range map[string]string{"ann": ann, "token": shared} {
		if status, answer := call(t, p, "POST", "/v1/admin/accounts", token, fmt.Sprintf(`{"id":"of-%s","name":"x"}`, name)); status != 201 {
			t.Fatalf("%s makes an account: %d %s", name, status, answer)
		}
	}
	if status, _ := call(t, p, "GET", "/v1/admin/accounts", ann[:len(ann)-1], ""); status != 401 {
		t.Errorf("a token cut short: %d", status)
	}
	_, log := call(t, p, "GET", "/v1/admin/audit", ann, "")
	for _, name := range []string{"ann", "token"} {
		found := false
		for line := range strings.Lines(log) {
			found = found || strings.Contains(line, `"operator:`+name+`"`) && strings.Contains(line, "account:of-"+name)
		}
		if !found {
			t.Errorf("no record says that %s did it: %s", name, log)
		}
	}
}
