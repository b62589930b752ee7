package repo

import (
	"bytes"
	"go/ast"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

func TestTopLevel(t *testing.T) {
	allowed := append([]string{"journal", "kms", "projections", "cmd", "docs", ".ci"}, local...)
	entries, err := os.ReadDir(root)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if e.IsDir() && !slices.Contains(allowed, e.Name()) {
			t.Errorf("folder %s: the top level holds %s and no other", e.Name(), strings.Join(allowed, ", "))
		}
	}
	for _, name := range []string{
		"go.mod", "go.sum", "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md",
		"docker-compose.yml", ".golangci.yml", ".ci/run", "docs/README.md", "docs/design.md",
	} {
		if _, err := os.Stat(filepath.Join(root, name)); err != nil {
			t.Error(err)
		}
	}
}

// TestWords refuses what a reader elsewhere could make nothing of. The patterns
// are put together so that this file does not hold them.
func TestWords(t *testing.T) {
	forbidden := []*regexp.Regexp{
		regexp.MustCompile(`(^|[^a-zA-Z0-9._-])/(wor` + `k|roo` + `t|hom` + `e|User` + `s)/[a-zA-Z]`), // a path of somebody's machine
		regexp.MustCompile(`\b(TO` + `DO|FIX` + `ME|XX` + `X|HA` + `CK)\b`),
		regexp.MustCompile(`(?i)not ` + `implemented|unimple` + `mented`),
		regexp.MustCompile(`panic\("(to` + `do|st` + `ub)`),
	}
	err := walk(func(name string) error {
		switch path.Ext(name) {
		case ".go", ".md", ".sh", ".py", ".yml", ".yaml", ".toml", ".conf", ".txt", ".txtar", ".json", "":
		default:
			return nil
		}
		text, err := os.ReadFile(filepath.Join(root, name))
		if err != nil {
			return err
		}
		for i, line := range bytes.Split(text, []byte("\n")) {
			for _, re := range forbidden {
				if m := re.Find(line); m != nil {
					t.Errorf("%s:%d: %q", name, i+1, m)
				}
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// maxLines is where a file has become two.
const maxLines = 700

func TestFileLength(t *testing.T) {
	for _, f := range goFiles(t) {
		if ast.IsGenerated(f.ast) {
			continue
		}
		if n := bytes.Count(f.text, []byte("\n")); n > maxLines {
			t.Errorf("%s has %d lines; split it, %d is the most", f.path, n, maxLines)
		}
	}
}

func TestPackageDocs(t *testing.T) {
	documented := make(map[string]bool)
	for _, f := range goFiles(t) {
		if f.test {
			continue
		}
		doc := f.ast.Doc.Text()
		if doc != "" && f.ast.Name.Name != "main" && !strings.HasPrefix(doc, "Package "+f.ast.Name.Name+" ") {
			t.Errorf("%s: the package comment does not begin with its name", f.path)
		}
		documented[f.dir()] = documented[f.dir()] || doc != ""
	}
	for dir, ok := range documented {
		if !ok {
			t.Errorf("package %s has no comment: what it does, promises and leaves out", dir)
		}
	}
}

// TestSentinelDocs holds that an exported error tells its caller what to do.
func TestSentinelDocs(t *testing.T) {
	for _, f := range goFiles(t) {
		if f.test {
			continue
		}
		for _, decl := range f.ast.Decls {
			gen, ok := decl.(*ast.GenDecl)
			if !ok {
				continue
			}
			for _, spec := range gen.Specs {
				v, ok := spec.(*ast.ValueSpec)
				if !ok {
					continue
				}
				for _, name := range v.Names {
					alone := len(gen.Specs) == 1 && gen.Doc.Text() != ""
					if isSentinel(name.Name) && v.Doc.Text() == "" && v.Comment.Text() == "" && !alone {
						t.Errorf("%s: %s has no comment that says what its caller should do", f.path, name.Name)
					}
				}
			}
		}
	}
}

// isSentinel says whether a name is that of an exported error value.
func isSentinel(name string) bool {
	rest, ok := strings.CutPrefix(name, "Err")
	return ok && rest != "" && rest[0] >= 'A' && rest[0] <= 'Z'
}

// TestSkipsGiveReasons: a skip that does not say what is missing is a test that
// nobody notices losing.
func TestSkipsGiveReasons(t *testing.T) {
	for _, f := range goFiles(t) {
		ast.Inspect(f.ast, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok {
				return true
			}
			sel, ok := call.Fun.(*ast.SelectorExpr)
			if !ok {
				return true
			}
			if sel.Sel.Name == "SkipNow" || sel.Sel.Name == "Skip" && len(call.Args) == 0 && (f.test || testSupport(f.dir())) {
				t.Errorf("%s: %s without a reason", f.path, sel.Sel.Name)
			}
			return true
		})
	}
}

// TestFuzzSeeds fails on a fuzz target that starts from nothing: a corpus glob
// that matches no file is the usual way to lose one silently.
func TestFuzzSeeds(t *testing.T) {
	files := goFiles(t)
	adds := make(map[string]bool) // dir.func → calls Add on something
	for _, f := range files {
		for _, fn := range functions(f) {
			if callsAdd(fn) {
				adds[f.dir()+"."+fn.Name.Name] = true
			}
		}
	}
	targets := 0
	for _, f := range files {
		for _, fn := range functions(f) {
			if !f.test || !strings.HasPrefix(fn.Name.Name, "Fuzz") || len(fn.Type.Params.List) != 1 {
				continue
			}
			targets++
			seeded := adds[f.dir()+"."+fn.Name.Name]
			ast.Inspect(fn, func(n ast.Node) bool {
				if call, ok := n.(*ast.CallExpr); ok {
					if helper, ok := call.Fun.(*ast.Ident); ok && adds[f.dir()+"."+helper.Name] {
						seeded = true
					}
				}
				return true
			})
			corpus, err := filepath.Glob(filepath.Join(root, f.dir(), "testdata", "fuzz", fn.Name.Name, "*"))
			if err != nil {
				t.Fatal(err)
			}
			if !seeded && len(corpus) == 0 {
				t.Errorf("%s: %s has no seed", f.path, fn.Name.Name)
			}
		}
	}
	if targets == 0 {
		t.Error("no fuzz target found")
	}
}

func functions(f file) []*ast.FuncDecl {
	var fns []*ast.FuncDecl
	for _, decl := range f.ast.Decls {
		if fn, ok := decl.(*ast.FuncDecl); ok && fn.Recv == nil {
			fns = append(fns, fn)
		}
	}
	return fns
}

func callsAdd(fn *ast.FuncDecl) bool {
	found := false
	ast.Inspect(fn, func(n ast.Node) bool {
		if call, ok := n.(*ast.CallExpr); ok {
			if sel, ok := call.Fun.(*ast.SelectorExpr); ok && sel.Sel.Name == "Add" {
				if recv, ok := sel.X.(*ast.Ident); ok && fuzzParam(fn) == recv.Name {
					found = true
				}
			}
		}
		return !found
	})
	return found
}

// fuzzParam is the name of a function's *testing.F, or "".
func fuzzParam(fn *ast.FuncDecl) string {
	for _, field := range fn.Type.Params.List {
		star, ok := field.Type.(*ast.StarExpr)
		if !ok {
			continue
		}
		if sel, ok := star.X.(*ast.SelectorExpr); ok && sel.Sel.Name == "F" && len(field.Names) == 1 {
			return field.Names[0].Name
		}
	}
	return ""
}
