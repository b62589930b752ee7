package repo

import (
	"go/ast"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// TestAPIDocument keeps docs/api/README.md and the server's tables of routes and
// problems from saying different things.
func TestAPIDocument(t *testing.T) {
	text, err := os.ReadFile(filepath.Join(root, "docs/api/README.md"))
	if err != nil {
		t.Fatal(err)
	}
	documented := make(map[string]bool)
	for _, m := range regexp.MustCompile("(?m)^\\| `((?:GET|POST|PUT|PATCH|DELETE) [^`]+)` \\|").FindAllStringSubmatch(string(text), -1) {
		documented[m[1]] = true
	}
	for _, m := range regexp.MustCompile("(?m)^\\| ([0-9, ]+) \\| `([a-z-]+)` \\|").FindAllStringSubmatch(string(text), -1) {
		for status := range strings.SplitSeq(m[1], ", ") {
			documented[status+" "+m[2]] = true
		}
	}
	inCode := make(map[string]bool)
	for _, f := range goFiles(t) {
		if f.dir() != "cmd/coffer/internal/server" || f.test {
			continue
		}
		ast.Inspect(f.ast, func(n ast.Node) bool {
			lit, ok := n.(*ast.CompositeLit)
			if !ok {
				return true
			}
			fields := literalFields(lit)
			if fields["method"] != "" && fields["path"] != "" {
				inCode[fields["method"]+" "+fields["path"]] = true
			}
			if fields["status"] != "" && fields["code"] != "" {
				inCode[fields["status"]+" "+fields["code"]] = true
			}
			return true
		})
	}
	if len(inCode) < 20 {
		t.Fatalf("only %d routes and problems found in the code", len(inCode))
	}
	for entry := range inCode {
		if !documented[entry] {
			t.Errorf("docs/api/README.md does not have %q", entry)
		}
	}
	for entry := range documented {
		if !inCode[entry] {
			t.Errorf("docs/api/README.md has %q, which the server does not", entry)
		}
	}
}

// TestConfigurationDocument holds docs/operations/configuration.md to the keys that
// the configuration file has.
func TestConfigurationDocument(t *testing.T) {
	text, err := os.ReadFile(filepath.Join(root, "docs/operations/configuration.md"))
	if err != nil {
		t.Fatal(err)
	}
	documented := make(map[string]bool)
	for _, m := range regexp.MustCompile("`(?:[a-z]+\\.)?([a-z_]+)`").FindAllStringSubmatch(string(text), -1) {
		documented[m[1]] = true
	}
	for _, m := range regexp.MustCompile("(?m)^## `\\[+([a-z]+)\\]+`").FindAllStringSubmatch(string(text), -1) {
		documented[m[1]] = true
	}
	keys := 0
	for _, f := range goFiles(t) {
		if f.dir() != "cmd/coffer/internal/config" || f.test {
			continue
		}
		ast.Inspect(f.ast, func(n ast.Node) bool {
			field, ok := n.(*ast.Field)
			if !ok || field.Tag == nil {
				return true
			}
			tag := reflect.StructTag(strings.Trim(field.Tag.Value, "`")).Get("toml")
			key, _, _ := strings.Cut(tag, ",")
			if key == "" || key == "-" {
				return true
			}
			keys++
			if !documented[key] && key != "tls" && key != "nats" && key != "keys" { // tables of a region
				t.Errorf("docs/operations/configuration.md does not have the key %s", key)
			}
			return true
		})
	}
	if keys < 20 {
		t.Errorf("only %d keys found in the code", keys)
	}
}

// literalFields returns the fields of a struct literal that are literals
// themselves.
func literalFields(lit *ast.CompositeLit) map[string]string {
	fields := make(map[string]string)
	for _, element := range lit.Elts {
		pair, ok := element.(*ast.KeyValueExpr)
		if !ok {
			continue
		}
		key, ok := pair.Key.(*ast.Ident)
		if !ok {
			continue
		}
		if value, ok := pair.Value.(*ast.BasicLit); ok {
			fields[key.Name] = value.Value
			if s, err := strconv.Unquote(value.Value); err == nil {
				fields[key.Name] = s
			}
		}
	}
	return fields
}
