package repo

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
)

const module = "github.com/cofferdb/coffer"

// root is the top of the repository, as seen from this package's folder, which is
// where the go command runs its tests.
const root = "../../../.."

// local names what a checkout may hold without belonging to the tree; .gitignore
// keeps it out of commits.
var local = []string{".git", ".cache", "coffer-data", "coffer"}

// file is one parsed Go file.
type file struct {
	path string // slash-separated, from the root
	test bool
	ast  *ast.File
	text []byte
}

// tree parses every Go file once. All build constraints are read: a rule that
// held on one platform only would be none.
var tree = sync.OnceValues(func() ([]file, error) {
	fset := token.NewFileSet()
	var files []file
	err := walk(func(name string) error {
		if path.Ext(name) != ".go" {
			return nil
		}
		text, err := os.ReadFile(filepath.Join(root, name))
		if err != nil {
			return err
		}
		parsed, err := parser.ParseFile(fset, name, text, parser.ParseComments|parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		files = append(files, file{
			path: name, test: strings.HasSuffix(name, "_test.go"), ast: parsed, text: text,
		})
		return nil
	})
	return files, err
})

// walk calls fn with every regular file of the repository. A nested module (the
// key servers that the tests start) has other dependencies and no part in the
// binary, so it is left out.
func walk(fn func(name string) error) error {
	return filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel(root, p)
		if err != nil {
			return err
		}
		name = filepath.ToSlash(name)
		if d.IsDir() {
			if !strings.Contains(name, "/") && slices.Contains(local, name) {
				return fs.SkipDir
			}
			if name != "." {
				if _, err := os.Stat(filepath.Join(p, "go.mod")); err == nil {
					return fs.SkipDir
				}
			}
			return nil
		}
		if !d.Type().IsRegular() || slices.Contains(local, name) {
			return nil
		}
		return fn(name)
	})
}

func goFiles(t *testing.T) []file {
	t.Helper()
	files, err := tree()
	if err != nil {
		t.Fatal(err)
	}
	if len(files) < 10 {
		t.Fatalf("only %d Go files found below %s: the rules would pass on nothing", len(files), root)
	}
	return files
}

// dir is the folder of a file's package, from the root.
func (f file) dir() string { return path.Dir(f.path) }

// imports lists the import paths of a file.
func (f file) imports() []string {
	var paths []string
	for _, spec := range f.ast.Imports {
		p, err := strconv.Unquote(spec.Path.Value)
		if err != nil {
			continue // the parser has checked it
		}
		paths = append(paths, p)
	}
	return paths
}

// importName is the name by which a file knows the package with that import path,
// or "" when it does not import it.
func (f file) importName(importPath string) string {
	for _, spec := range f.ast.Imports {
		p, _ := strconv.Unquote(spec.Path.Value)
		if p != importPath {
			continue
		}
		if spec.Name != nil {
			return spec.Name.Name
		}
		return path.Base(p)
	}
	return ""
}

// below says whether folder is dir or inside it.
func below(dir, folder string) bool {
	return dir == folder || strings.HasPrefix(dir, folder+"/")
}
