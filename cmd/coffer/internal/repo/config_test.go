package repo

import (
	"go/ast"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"
)

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
