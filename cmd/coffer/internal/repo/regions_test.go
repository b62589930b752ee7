package repo

import (
	"go/ast"
	"slices"
	"testing"
)

// regional are the types that hold data or keys of one region, and of which a region
// needs no list.
var regional = map[string][]string{
	module + "/journal":                       {"Journal", "Callbacks", "Mover"},
	module + "/journal/attachments":           {"Store"},
	module + "/kms":                           {"Keyring"},
	module + "/projections":                   {"Store"},
	module + "/projections/pebble":            {"Store"},
	module + "/projections/history":           {"View"},
	module + "/projections/roaming":           {"View"},
	module + "/projections/callbacks":         {"View"},
	module + "/cmd/coffer/internal/server":    {"Server"},
	module + "/cmd/coffer/internal/exports":   {"Exports"},
	module + "/cmd/coffer/internal/keys":      {"Admin"},
	module + "/cmd/coffer/internal/deliver":   {"Engine"},
	module + "/cmd/coffer/internal/accounts":  {"Store"},
	module + "/cmd/coffer/internal/profiles":  {"Store"},
	module + "/cmd/coffer/internal/endpoints": {"Store"},
}

// opens are the calls that open a region's data.
var opens = map[string]string{
	module + "/journal": "Open", module + "/kms": "NewKeyring", module + "/cmd/coffer/internal/server": "New",
}

const nodeDir = "cmd/coffer/internal/node"

// TestNothingHoldsTwoRegions: what reaches the data of one region reaches that of no
// other. There is no list, map or channel of what holds a region's data but the list
// of regions that a process has, which nothing of a region can see; only the wiring
// opens a region, and what measures or tests one.
func TestNothingHoldsTwoRegions(t *testing.T) {
	lists, opened, methods := 0, 0, 0
	for _, f := range goFiles(t) {
		if f.test || testSupport(f.dir()) {
			continue
		}
		holds := func(e ast.Expr) bool {
			if star, ok := e.(*ast.StarExpr); ok {
				e = star.X
			}
			if id, ok := e.(*ast.Ident); ok {
				if slices.Contains(regional[module+"/"+f.dir()], id.Name) {
					return true
				}
				return f.dir() == nodeDir && (id.Name == "region" || id.Name == "Parts")
			}
			sel, ok := e.(*ast.SelectorExpr)
			if !ok {
				return false
			}
			pkg, ok := sel.X.(*ast.Ident)
			if !ok {
				return false
			}
			for path, names := range regional {
				for _, name := range names {
					if pkg.Name == f.importName(path) && sel.Sel.Name == name {
						return true
					}
				}
			}
			return false
		}
		ast.Inspect(f.ast, func(n ast.Node) bool {
			var element ast.Expr
			switch n := n.(type) {
			case *ast.ArrayType:
				element = n.Elt
			case *ast.MapType:
				element = n.Value
			case *ast.ChanType:
				element = n.Value
			case *ast.Ellipsis:
				element = n.Elt
			case *ast.CallExpr:
				sel, ok := n.Fun.(*ast.SelectorExpr)
				if !ok {
					return true
				}
				pkg, ok := sel.X.(*ast.Ident)
				for path, name := range opens {
					if !ok || sel.Sel.Name != name || f.importName(path) == "" || pkg.Name != f.importName(path) {
						continue
					}
					opened++
					// The journal opens the keyring of its region.
					if f.dir() != nodeDir && f.dir() != "cmd/coffer/internal/bench" && (f.dir() != "journal" || name != "NewKeyring") {
						t.Errorf("%s opens a region's %s", f.path, path)
					}
				}
			}
			if element == nil || !holds(element) {
				return true
			}
			if lists++; f.path != nodeDir+"/node.go" {
				t.Errorf("%s has a type that can hold the data of several regions", f.path)
			}
			return true
		})
		if f.dir() != nodeDir {
			continue
		}
		for _, d := range f.ast.Decls {
			fn, ok := d.(*ast.FuncDecl)
			if !ok || fn.Recv == nil || len(fn.Recv.List) != 1 || !holds(fn.Recv.List[0].Type) {
				continue
			}
			methods++
			ast.Inspect(fn, func(n ast.Node) bool {
				if id, ok := n.(*ast.Ident); ok && (id.Name == "Process" || id.Name == "regions") {
					t.Errorf("%s: %s of a region sees the process, and so the other regions", f.path, fn.Name.Name)
				}
				return true
			})
		}
	}
	if lists == 0 || opened < 3 || methods < 10 {
		t.Errorf("%d lists, %d openings, %d methods of a region were found: the rule would pass on nothing", lists, opened, methods)
	}
	t.Logf("%d lists, %d openings, %d methods of a region", lists, opened, methods)
}
