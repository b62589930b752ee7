package server

import (
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cofferdb/coffer/kms"
)

// TestErrorTableIsComplete finds every exported sentinel of the libraries in
// the error table, by reading the source of both: one that is added without a
// row would become "internal", and nobody would notice.
func TestErrorTableIsComplete(t *testing.T) {
	const root = "../../../.."
	mapped := mappedErrors(t)
	found := 0
	for dir, name := range map[string]string{
		"kms": "kms", "journal": "journal", "journal/attachments": "attachments", "cmd/coffer/internal/erasures": "erasures", "cmd/coffer/internal/signing": "signing", "projections": "projections", "projections/history": "history",
		"cmd/coffer/internal/auth": "auth", "cmd/coffer/internal/accounts": "accounts",
		"cmd/coffer/internal/keys": "keys", "cmd/coffer/internal/exports": "exports",
	} {
		for _, sentinel := range sentinels(t, filepath.Join(root, dir)) {
			found++
			if !mapped[name+"."+sentinel] {
				t.Errorf("%s.%s has no row in the error table", name, sentinel)
			}
		}
	}
	if found < 30 {
		t.Errorf("only %d sentinels found", found)
	}
}

func sentinels(t *testing.T, dir string) []string {
	t.Helper()
	var names []string
	files, err := filepath.Glob(filepath.Join(dir, "*.go"))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range files {
		if strings.HasSuffix(path, "_test.go") {
			continue
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range file.Decls {
			g, ok := d.(*ast.GenDecl)
			if !ok || g.Tok != token.VAR {
				continue
			}
			for _, spec := range g.Specs {
				for _, n := range spec.(*ast.ValueSpec).Names {
					if strings.HasPrefix(n.Name, "Err") {
						names = append(names, n.Name)
					}
				}
			}
		}
	}
	return names
}

// mappedErrors reads the rows of errorTable as "package.Name".
func mappedErrors(t *testing.T) map[string]bool {
	t.Helper()
	file, err := parser.ParseFile(token.NewFileSet(), "problem.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	mapped := make(map[string]bool)
	ast.Inspect(file, func(n ast.Node) bool {
		f, ok := n.(*ast.FuncDecl)
		if !ok {
			return true
		}
		if f.Name.Name != "errorTable" {
			return false
		}
		ast.Inspect(f, func(n ast.Node) bool {
			if s, ok := n.(*ast.SelectorExpr); ok {
				if p, ok := s.X.(*ast.Ident); ok {
					mapped[p.Name+"."+s.Sel.Name] = true
				}
			}
			return true
		})
		return false
	})
	return mapped
}

func TestErrorTable(t *testing.T) {
	s := New(Options{})
	for _, m := range s.errors {
		p := s.problemOf(fmt.Errorf("doing something: %w", m.err))
		if p.Code != m.kind.code || p.Status != m.kind.status {
			t.Errorf("%v becomes %s %d, want %s %d: an earlier row shadows it", m.err, p.Code, p.Status, m.kind.code, m.kind.status)
		}
		if p.Title == "" || p.Detail == "" {
			t.Errorf("%v has no title or no detail", m.err)
		}
	}
	// Whether to try again is what a caller branches on.
	for err, retryable := range map[error]bool{
		&kms.Error{Class: kms.ErrUnavailable}: true, &kms.Error{Class: kms.ErrThrottled}: true,
		&kms.Error{Class: kms.ErrDisabled}: false, &kms.Error{Class: kms.ErrAccessDenied}: false,
	} {
		if p := s.problemOf(err); p.Retryable != retryable || p.Code != "kms-unavailable" || p.Status != 503 {
			t.Errorf("%v becomes %+v", err, p)
		}
	}
	secret := errors.New("canary-text-of-an-unknown-error")
	if p := s.problemOf(secret); p.Code != "internal" || strings.Contains(p.Detail, "canary") || p.Retryable {
		t.Errorf("an unknown error becomes %+v", p)
	}
}
