package repo

import (
	"go/ast"
	"path"
	"slices"
	"strings"
	"testing"
)

// testSupport are the packages that exist for tests; they alone may import
// testing outside a _test.go file, and nothing that ships imports them.
func testSupport(dir string) bool {
	return strings.HasSuffix(path.Base(dir), "test") || below(dir, "cmd/coffer/internal/repo")
}

// provider says whether a folder is a key provider.
func provider(dir string) bool {
	return below(dir, "kms/local") || below(dir, "kms/vault") || below(dir, "kms/awskms")
}

// layer is a folder's place in the import line, 0 being the end of it.
func layer(dir string) int {
	switch {
	case below(dir, "kms"):
		return 0
	case below(dir, "journal"):
		return 1
	case below(dir, "projections/history"), below(dir, "projections/roaming"), below(dir, "projections/callbacks"):
		return 3
	case below(dir, "projections"):
		return 2
	default: // cmd, and what a document's example may bring
		return 4
	}
}

// TestLayering holds the one line of imports, which is what lets a backend team
// embed kms or journal without the rest. Tests are held to it too, except that
// they may use the local provider, which is the real one that needs no server.
func TestLayering(t *testing.T) {
	for _, f := range goFiles(t) {
		for _, imported := range f.imports() {
			target, ours := strings.CutPrefix(imported, module+"/")
			if !ours {
				continue
			}
			if layer(target) > layer(f.dir()) {
				t.Errorf("%s imports %s, which stands above it", f.path, target)
			}
			if provider(target) && !below(f.dir(), target) && !below(f.dir(), "cmd/coffer") && !f.test && !testSupport(f.dir()) {
				t.Errorf("%s imports the provider %s; only cmd/coffer wires providers", f.path, target)
			}
			if testSupport(target) && !f.test && !testSupport(f.dir()) {
				t.Errorf("%s ships, and imports the test support %s", f.path, target)
			}
		}
	}
}

// foreign names dependencies that are let in at one place only.
var foreign = []struct {
	prefix string
	why    string
	allow  func(file) bool
}{
	{"testing", "the testing package stays out of the binary", func(f file) bool {
		return f.test || testSupport(f.dir())
	}},
	{"github.com/nats-io", "only journal and the wiring speak NATS: handlers and projections never do", func(f file) bool {
		if f.test && !below(f.dir(), "cmd/coffer/internal/server") {
			return true // a fault is made where it can be made
		}
		return below(f.dir(), "journal") || wiring(f.dir())
	}},
	{"github.com/hashicorp/vault", "only kms/vault knows Vault's client", func(f file) bool {
		return below(f.dir(), "kms/vault") || f.test
	}},
	{"github.com/aws", "only kms/awskms knows the AWS SDK", func(f file) bool {
		return below(f.dir(), "kms/awskms") || f.test
	}},
	{"github.com/cockroachdb/pebble", "only projections/pebble knows Pebble", func(f file) bool {
		return below(f.dir(), "projections/pebble") || f.test || below(f.dir(), "cmd/coffer/internal/bench")
	}},
	{"github.com/jackc/pgx", "Postgres is a comparison, not yet a store", func(f file) bool {
		return below(f.dir(), "projections/postgres") || f.test || below(f.dir(), "cmd/coffer/internal/bench")
	}},
	{"github.com/compose-spec", "a test reads the compose file", func(f file) bool { return f.test }},
	{"pgregory.net/rapid", "a test library", func(f file) bool { return f.test || testSupport(f.dir()) }},
	{"go.uber.org/goleak", "a test library", func(f file) bool { return f.test || testSupport(f.dir()) }},
}

// wiring says whether a folder of cmd/coffer puts the parts together, which is
// the one thing that has to know what they are made of.
func wiring(dir string) bool {
	return below(dir, "cmd/coffer") && !below(dir, "cmd/coffer/internal/server") &&
		!below(dir, "cmd/coffer/internal/auth")
}

// TestForeignImports keeps each outside library behind the one package that
// exists to hide it.
func TestForeignImports(t *testing.T) {
	for _, f := range goFiles(t) {
		for _, imported := range f.imports() {
			for _, rule := range foreign {
				if imported != rule.prefix && !strings.HasPrefix(imported, rule.prefix+"/") {
					continue
				}
				if !rule.allow(f) {
					t.Errorf("%s imports %s: %s", f.path, imported, rule.why)
				}
			}
		}
	}
}

// sealedOnly is what a projection may name of package kms: how envelopes and tags
// are written, and nothing that could open one.
var sealedOnly = []string{
	"Tag", "TagSize", "ParseTag", "Header", "HeaderSize", "ParseHeader", "Overhead", "EnvelopeOverhead", "ErrEnvelope",
}

// TestProjectionsHoldNoKeys checks that no view can open what it stores.
func TestProjectionsHoldNoKeys(t *testing.T) {
	const kms = module + "/kms"
	for _, f := range goFiles(t) {
		if !below(f.dir(), "projections") || f.test || testSupport(f.dir()) {
			continue
		}
		name := f.importName(kms)
		if name == "" {
			continue
		}
		ast.Inspect(f.ast, func(n ast.Node) bool {
			sel, ok := n.(*ast.SelectorExpr)
			if !ok {
				return true
			}
			if pkg, ok := sel.X.(*ast.Ident); ok && pkg.Name == name && !slices.Contains(sealedOnly, sel.Sel.Name) {
				t.Errorf("%s uses kms.%s; a projection sees sealed records only", f.path, sel.Sel.Name)
			}
			return true
		})
	}
}
