package server

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
)

const apiDocs = "../../../../docs/api"

// TestAPIDocuments holds docs/api/openapi.json and docs/api/README.md to what the
// code makes. COFFER_UPDATE_DOCS=1 writes them.
func TestAPIDocuments(t *testing.T) {
	document, err := Document()
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string][]byte{"openapi.json": document, "README.md": reference(t, document)} {
		path := filepath.Join(apiDocs, name)
		if os.Getenv("COFFER_UPDATE_DOCS") != "" {
			if err := os.WriteFile(path, want, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		have, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(have, want) {
			t.Errorf("docs/api/%s is not what the code makes; write it with COFFER_UPDATE_DOCS=1 go test ./cmd/coffer/internal/server -run TestAPIDocuments", name)
		}
	}
}

// TestEveryRouteIsDescribed: a route without a description, or the other way
// round, would leave a hole in the document.
func TestEveryRouteIsDescribed(t *testing.T) {
	s := &Server{kinds: kinds(), limits: Limits{}.withDefaults()}
	descriptions := s.descriptions()
	for _, r := range s.routes() {
		name := r.method + " " + r.path
		d, ok := descriptions[name]
		if !ok || d.id == "" || d.summary == "" || len(d.answers) == 0 || (r.bodies != nil && r.bodies[0] != typeAny) != (d.body != nil) {
			t.Errorf("%s is not described, or not wholly", name)
		}
		for _, q := range r.query {
			if d.query[q].schema == nil && queryParameters()[q].schema == nil {
				t.Errorf("%s: the parameter %s is not described", name, q)
			}
		}
		delete(descriptions, name)
	}
	for name := range descriptions {
		t.Errorf("%s is described and is no route", name)
	}
}

type openAPI struct {
	Paths map[string]map[string]struct {
		Summary, Description string
		Security             []map[string][]string
		Parameters           []struct {
			Name, In, Description string
		}
		RequestBody *struct {
			Description string
			Content     map[string]struct{ Schema json.RawMessage }
		}
		Responses map[string]struct {
			Description string
			Content     map[string]struct {
				Schema json.RawMessage
			}
		}
	}
}

// reference renders the document as Markdown.
func reference(t *testing.T, document []byte) []byte {
	t.Helper()
	var api openAPI
	if err := json.Unmarshal(document, &api); err != nil {
		t.Fatal(err)
	}
	var b, sections bytes.Buffer
	b.WriteString(referenceHead)
	s := &Server{kinds: kinds(), limits: Limits{}.withDefaults()}
	for _, r := range s.routes() {
		op := api.Paths[r.path][strings.ToLower(r.method)]
		who := cmp.Or(strings.Join(r.callers(), ", "), "anyone")
		fmt.Fprintf(&b, "| `%s %s` | %s | %s |\n", r.method, r.path, who, op.Summary)
		fmt.Fprintf(&sections, "\n### %s %s\n\n%s. Caller: %s.\n", r.method, r.path, op.Summary, who)
		if op.Description != "" {
			fmt.Fprintf(&sections, "\n%s\n", op.Description)
		}
		if len(op.Parameters) > 0 {
			sections.WriteString("\n| parameter | in | |\n| --- | --- | --- |\n")
			for _, p := range op.Parameters {
				fmt.Fprintf(&sections, "| `%s` | %s | %s |\n", p.Name, p.In, p.Description)
			}
		}
		if op.RequestBody != nil {
			fmt.Fprintf(&sections, "\nBody: `%s`, %s.\n", strings.Join(slices.Sorted(maps.Keys(op.RequestBody.Content)), "`, `"), op.RequestBody.Description)
		}
		sections.WriteString("\n| answer | |\n| --- | --- |\n")
		for _, status := range slices.Sorted(maps.Keys(op.Responses)) {
			response := op.Responses[status]
			text := response.Description
			if _, problem := response.Content["application/problem+json"]; problem && len(response.Content) == 1 {
				text = "`" + strings.ReplaceAll(text, ", ", "`, `") + "`"
			}
			fmt.Fprintf(&sections, "| %s | %s |\n", status, text)
		}
		fmt.Fprintf(&sections, "\n```sh\n%s\n```\n", curlLine(r))
	}
	b.WriteString("\n## Problems\n\nWhat to do about each is in the [guide](guide.md#problems).\n\n| status | code | title |\n| --- | --- | --- |\n")
	statuses := map[string][]string{}
	titles := map[string]string{}
	for _, k := range kindList(kinds()) {
		if status := fmt.Sprint(k.status); !slices.Contains(statuses[k.code], status) {
			statuses[k.code] = append(statuses[k.code], status)
		}
		titles[k.code] = cmp.Or(titles[k.code], k.title)
	}
	codes := slices.SortedFunc(maps.Keys(statuses), func(x, y string) int {
		return cmp.Or(strings.Compare(statuses[x][0], statuses[y][0]), strings.Compare(x, y))
	})
	for _, code := range codes {
		slices.Sort(statuses[code])
		fmt.Fprintf(&b, "| %s | `%s` | %s |\n", strings.Join(statuses[code], ", "), code, titles[code])
	}
	b.WriteString("\n## Each route\n")
	b.Write(sections.Bytes())
	return b.Bytes()
}

// curlLine calls the route; the variables are those of dev.env.
func curlLine(r route) string {
	path := strings.NewReplacer("{app}", "$COFFER_APP", "{event}", "note-1", "{conversation}", "ann,ben", "{job}", "$JOB").Replace(r.path)
	line := `curl --cacert "$COFFER_CA"`
	switch {
	case r.who&operator != 0:
		line += ` -H "Authorization: Bearer $COFFER_OPERATOR_TOKEN"`
	case r.who != anyone:
		line += ` -H "Authorization: Bearer $COFFER_TOKEN"`
	}
	line += ` "$COFFER_URL` + path + `"`
	switch {
	case r.bodies == nil && r.method != "GET":
		line += " -X " + r.method
	case strings.HasSuffix(r.path, "/events") && r.method == "POST":
		line += " \\\n  --json '" + `{"id":"note-1","type":"message.sent","sender":"ann","recipient":"ben","data":{"bodies":[{"type":"txt","msg":"It is in."}]}}` + "'"
	case strings.HasSuffix(r.path, "/admin/apps") && r.method == "POST":
		line += ` --json '{"name":"harbour","plan":"pro"}'`
	case r.bodies != nil:
		line += " --json @body.json"
	case strings.HasSuffix(r.path, "/events"):
		line += "\n" + strings.Replace(line, "curl", "curl -N -H 'Accept: text/event-stream'", 1)
	}
	return line
}

const referenceHead = `# The HTTP interface

This page and [openapi.json](openapi.json) (OpenAPI 3.1) are made from the server's
route table; a running server has the latter at ` + "`/openapi.json`" + `. The
[guide](guide.md) explains events, replay, live tails, limits and problems, and
[examples](examples/README.md) has programs that need standard libraries only.

The lines for curl take their variables from ` + "`coffer-data/dev.env`" + `, which
` + "`coffer serve --dev`" + ` writes.

## Routes

| route | caller | |
| --- | --- | --- |
`

// kindList is the fields of the table of problems.
func kindList(t kindTable) []kind {
	var list []kind
	v := reflect.ValueOf(t)
	for _, f := range v.Fields() {
		list = append(list, kind{
			status: int(f.FieldByName("status").Int()), code: f.FieldByName("code").String(), title: f.FieldByName("title").String(),
		})
	}
	return list
}
