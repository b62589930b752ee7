package repo

import (
	"net/url"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// link finds the target of an inline Markdown link or image.
var link = regexp.MustCompile(`\]\(([^)\s]+)(?:\s+"[^"]*")?\)`)

// TestMarkdownLinks follows every link inside the repository, with its anchor.
func TestMarkdownLinks(t *testing.T) {
	links := 0
	err := walk(func(name string) error {
		if path.Ext(name) != ".md" {
			return nil
		}
		for line, text := range prose(t, name) {
			for _, m := range link.FindAllStringSubmatch(text, -1) {
				u, err := url.Parse(m[1])
				if err != nil {
					t.Errorf("%s:%d: %v", name, line+1, err)
					continue
				}
				if u.Scheme != "" || u.Host != "" {
					continue
				}
				links++
				target := name
				if u.Path != "" {
					target = path.Join(path.Dir(name), u.Path)
				}
				if _, err := os.Stat(filepath.Join(root, target)); err != nil {
					t.Errorf("%s:%d: link to %s: nothing there", name, line+1, m[1])
					continue
				}
				if u.Fragment != "" && path.Ext(target) == ".md" && !anchors(t, target)[u.Fragment] {
					t.Errorf("%s:%d: link to %s: no such heading", name, line+1, m[1])
				}
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if links < 10 {
		t.Errorf("only %d internal links found: the pattern no longer matches", links)
	}
}

// prose returns a document's lines, with those inside fenced code blanked.
func prose(t *testing.T, name string) []string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(root, name))
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(string(text), "\n")
	fenced := false
	for i, line := range lines {
		if strings.HasPrefix(strings.TrimSpace(line), "```") {
			fenced = !fenced
			lines[i] = ""
		} else if fenced {
			lines[i] = ""
		}
	}
	if fenced {
		t.Errorf("%s: a code fence is not closed", name)
	}
	return lines
}

var notSlug = regexp.MustCompile(`[^\p{L}\p{N}\s_-]`)

// anchors lists a document's headings as the links to them are written.
func anchors(t *testing.T, name string) map[string]bool {
	t.Helper()
	found := make(map[string]bool)
	for _, line := range prose(t, name) {
		heading := strings.TrimLeft(line, "#")
		if heading == line || !strings.HasPrefix(heading, " ") {
			continue
		}
		slug := notSlug.ReplaceAllString(strings.ToLower(strings.TrimSpace(heading)), "")
		found[strings.ReplaceAll(slug, " ", "-")] = true
	}
	return found
}

// TestDocsAreIndexed keeps every document reachable from docs/README.md.
func TestDocsAreIndexed(t *testing.T) {
	linked := make(map[string]bool)
	queue := []string{"docs/README.md"}
	for len(queue) > 0 {
		name := queue[0]
		queue = queue[1:]
		if linked[name] {
			continue
		}
		linked[name] = true
		for _, text := range prose(t, name) {
			for _, m := range link.FindAllStringSubmatch(text, -1) {
				u, err := url.Parse(m[1])
				if err != nil || u.Scheme != "" || u.Path == "" {
					continue
				}
				target := path.Join(path.Dir(name), u.Path)
				info, err := os.Stat(filepath.Join(root, target))
				if err != nil || info.IsDir() {
					continue // TestMarkdownLinks reports what is missing
				}
				if path.Ext(target) == ".md" {
					queue = append(queue, target)
				}
			}
		}
	}
	err := walk(func(name string) error {
		if path.Ext(name) == ".md" && strings.HasPrefix(name, "docs/") && !linked[name] {
			t.Errorf("%s is not reachable from docs/README.md", name)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// namedTest finds a test that a document names, with the file it links to.
var namedTest = regexp.MustCompile("(?:\\[)?`((?:Test|Fuzz|Example)[A-Z]\\w*)`(?:\\]\\(([^)]+)\\))?")

// TestNamedTestsExist: a document that says which test shows a promise is worth
// something only while the test is there, in the file that it links to if it does.
func TestNamedTestsExist(t *testing.T) {
	inFile, anywhere := make(map[string]bool), make(map[string]bool)
	for _, f := range goFiles(t) {
		for _, fn := range functions(f) {
			inFile[f.path+" "+fn.Name.Name] = true
			anywhere[fn.Name.Name] = true
		}
	}
	err := walk(func(name string) error {
		if path.Ext(name) != ".md" {
			return nil
		}
		for i, text := range prose(t, name) {
			for _, m := range namedTest.FindAllStringSubmatch(text, -1) {
				if !anywhere[m[1]] {
					t.Errorf("%s:%d: there is no %s", name, i+1, m[1])
				} else if m[2] != "" && !inFile[path.Join(path.Dir(name), m[2])+" "+m[1]] {
					t.Errorf("%s:%d: %s has no %s", name, i+1, m[2], m[1])
				}
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

var namedDocument = regexp.MustCompile(`\bdocs/[a-z0-9/_.-]+\.(?:md|py|json|toml|conf|sh)\b`)

// TestNamedDocumentsExist: what the code's comments and errors point at is there.
func TestNamedDocumentsExist(t *testing.T) {
	for _, f := range goFiles(t) {
		for _, name := range namedDocument.FindAllString(string(f.text), -1) {
			if _, err := os.Stat(filepath.Join(root, name)); err != nil {
				t.Errorf("%s names %s, which is not there", f.path, name)
			}
		}
	}
}

// TestLibrariesHaveExamples: each package that a backend team can import shows how.
func TestLibrariesHaveExamples(t *testing.T) {
	libraries := make(map[string]bool)
	for _, f := range goFiles(t) {
		dir := f.dir()
		if below(dir, "cmd") || below(dir, "kms/internal") || testSupport(dir) {
			continue
		}
		has := libraries[dir]
		for _, fn := range functions(f) {
			has = has || f.test && strings.HasPrefix(fn.Name.Name, "Example")
		}
		libraries[dir] = has
	}
	for dir, has := range libraries {
		if !has {
			t.Errorf("package %s has no Example", dir)
		}
	}
}
