package main

import (
	"bytes"
	"compress/gzip"
	"crypto/aes"
	"crypto/cipher"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"runtime/pprof"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/cofferdb/coffer/cmd/coffer/internal/node"
	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/journal/embedded"
	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/kms/local"
)

// canaries are what must be nowhere: content, ids, secrets and keys.
type canaries map[string][]byte

// add adds a secret, and forms of it in which it could be written.
func (c canaries) add(what string, secret []byte) {
	c[what] = secret
	c[what+" in hex"] = []byte(hex.EncodeToString(secret))
	// Base64 has three alignments; the middle of each is looked for.
	for shift := range 3 {
		text := base64.StdEncoding.EncodeToString(append(make([]byte, shift, shift+len(secret)), secret...))
		c[fmt.Sprint(what, " in base64, shifted by ", shift)] = []byte(text[4 : len(text)-4])
	}
}

// search fails the test for each canary in the text.
func (c canaries) search(t *testing.T, where string, text []byte, except ...string) {
	t.Helper()
next:
	for what, b := range c {
		if !bytes.Contains(text, b) {
			continue
		}
		for _, e := range except {
			if strings.HasPrefix(what, e) {
				continue next
			}
		}
		t.Errorf("%s holds the %s", where, what)
	}
}

// handedOut are what the development set-up gives to its user, in files of mode
// 0600.
var handedOut = map[string][]string{
	"dev.env": {"certificate", "token", "operator's token"}, "dev.json": {"certificate", "token", "operator's token"},
	"operator.token": {"operator's token"},
}

func (c canaries) searchDir(t *testing.T, dir string) (files int) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		name, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		files++
		c.search(t, name, text, handedOut[name]...)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// devClient speaks to a development server.
type devClient struct {
	t    *testing.T
	vars map[string]string
	http *http.Client
}

func newDevClient(t *testing.T, vars map[string]string) *devClient {
	t.Helper()
	pem, err := os.ReadFile(vars["COFFER_CA"])
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(pem)
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}}
	t.Cleanup(transport.CloseIdleConnections)
	return &devClient{t: t, vars: vars, http: &http.Client{Transport: transport}}
}

func (c *devClient) do(method, path, body string) (int, []byte) {
	c.t.Helper()
	req, err := http.NewRequestWithContext(c.t.Context(), method, c.vars["COFFER_URL"]+path, strings.NewReader(body))
	if err != nil {
		c.t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+c.vars["COFFER_TOKEN"])
	req.Header.Set("Content-Type", "application/json")
	resp, err := c.http.Do(req)
	if err != nil {
		c.t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	answer, err := io.ReadAll(resp.Body)
	if err != nil {
		c.t.Fatal(err)
	}
	return resp.StatusCode, answer
}

func (c *devClient) events() string { return "/v1/apps/" + c.vars["COFFER_APP"] + "/events" }

const (
	canaryText         = "canary-text-51d0c7"
	canaryUser         = "canary-user-82be91"
	canaryPeer         = "canary-peer-3f6a20"
	canaryConversation = "canary-conv-e07b44"
	canaryEvent        = "canary-event-9c15d8"
)

func newCanaries(vars map[string]string) canaries {
	c := canaries{}
	c.add("text", []byte(canaryText))
	c.add("user", []byte(canaryUser))
	c.add("peer", []byte(canaryPeer))
	c.add("conversation", []byte(canaryConversation))
	c.add("event id", []byte(canaryEvent))
	c.add("certificate", []byte(vars["COFFER_APP_CERTIFICATE"]))
	c.add("token", []byte(vars["COFFER_TOKEN"]))
	c.add("operator's token", []byte(vars["COFFER_OPERATOR_TOKEN"]))
	return c
}

// fill appends, replays and asks for what is refused.
func (c *devClient) fill(secret canaries, round int) {
	c.t.Helper()
	for i := range 20 {
		for _, event := range []string{
			fmt.Sprintf(`{"id":"%s-%d-%d","type":"message.sent","sender":%q,"recipient":%q,"data":{"bodies":[{"type":"txt","msg":%q}]}}`, canaryEvent, round, i, canaryUser, canaryPeer, canaryText),
			fmt.Sprintf(`{"type":"message.sent","sender":%q,"conversation":%q,"conversationtype":"group","data":{"bodies":[{"type":"txt","msg":%q}],"ext":{"k":%q}}}`, canaryUser, canaryConversation, canaryText, canaryText),
		} {
			if status, answer := c.do("POST", c.events(), event); status != http.StatusCreated {
				c.t.Fatalf("append: %d %s", status, answer)
			}
		}
	}
	var answer []byte
	for end := time.Now().Add(startLimit); bytes.Count(answer, []byte(canaryText)) == 0; time.Sleep(10 * time.Millisecond) {
		if _, answer = c.do("GET", c.events()+"?user="+canaryUser, ""); time.Now().After(end) {
			c.t.Fatalf("replay: %s", answer)
		}
	}
	app := "/v1/apps/" + c.vars["COFFER_APP"]
	for _, r := range [][3]string{
		{"POST", c.events(), `{"` + canaryEvent + `":1}`},
		{"POST", c.events(), `{"type":"message.sent","sender":"` + canaryUser + `","recipient":"x","data":{"bodies":[{"type":"nonsense","msg":"` + canaryText + `"}]}}`},
		{"POST", c.events(), canaryText},
		{"POST", c.events(), fmt.Sprintf(`{"id":"%s-%d-0","type":"message.sent","sender":%q,"recipient":%q,"data":{"bodies":[{"type":"txt","msg":"other"}]}}`, canaryEvent, round, canaryUser, canaryPeer)},
		{"GET", c.events() + "?user=" + canaryUser + "%2F", ""},
		{"GET", c.events() + "?" + canaryText + "=1", ""},
		{"GET", app + "/" + canaryText, ""},
		{"GET", "/v1/apps/03" + strings.Repeat("00", 15) + "/events?user=" + canaryUser, ""},
		{"DELETE", c.events() + "/" + canaryEvent, ""},
		{"GET", "/metrics", ""},
		{"GET", "/readyz", ""},
		{"GET", "/livez", ""},
	} {
		status, answer := c.do(r[0], r[1], r[2])
		if status == http.StatusCreated {
			c.t.Errorf("%s %s was accepted", r[0], r[1])
		}
		// An answer to its own caller may name the id that it asked for; it
		// holds no content, secret or key.
		secret.search(c.t, "the answer to "+r[0]+" "+r[1], answer, "event id", "user", "conversation", "peer")
	}
}

// keysOf unwraps every key that the stopped server of a folder has for region eu.
func keysOf(t *testing.T, dir string) map[string][]byte {
	t.Helper()
	ctx := t.Context()
	srv, err := embedded.Start(ctx, embedded.Options{StoreDir: filepath.Join(dir, "eu", "nats"), Name: "coffer-eu"})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = srv.Close() }()
	nc, err := srv.Connect()
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	provider, err := local.Open(ctx, local.Options{Path: filepath.Join(dir, "eu", "kek.json")})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = provider.Close() }()
	rows := journal.NewRows(js, journal.KeyringBucket("eu"), nil)
	load := func(name string, into any) {
		row, err := rows.Load(ctx, name)
		if err == nil {
			err = json.Unmarshal(row.Value, into)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	var names []string
	for name, err := range rows.List(ctx, "") {
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, name)
	}
	found := map[string][]byte{}
	for _, name := range names {
		app, ok := strings.CutPrefix(name, "app.")
		if !ok {
			continue
		}
		var row struct {
			Keys []struct {
				Generation uint32     `json:"generation"`
				Wraps      []kms.Wrap `json:"wraps"`
			} `json:"keys"`
			TagKey  []byte `json:"tag_key"`
			BlobKey []byte `json:"blob_key"`
			Epochs  []struct {
				ID  uint32 `json:"id"`
				Key []byte `json:"key"`
			} `json:"epochs"`
		}
		load(name, &row)
		key, err := provider.Unwrap(ctx, kms.Context{Region: "eu", App: app, Purpose: kms.PurposeApp}, row.Keys[0].Wraps[0])
		if err != nil {
			t.Fatal(err)
		}
		open := func(what, kind string, id, blob []byte) {
			found[what] = openWrapped(t, key, app, kind, id, blob)
		}
		found["app key"] = key
		open("tag key", "tag", nil, row.TagKey)
		open("blob key", "blob", nil, row.BlobKey)
		for _, e := range row.Epochs {
			open(fmt.Sprint("epoch key ", e.ID), "epoch", binary.BigEndian.AppendUint32(nil, e.ID), e.Key)
		}
		for _, page := range names {
			if !strings.HasPrefix(page, "sub."+app+".") {
				continue
			}
			var p struct {
				Subjects []struct {
					Tag kms.Tag `json:"tag"`
					Key []byte  `json:"key"`
				} `json:"subjects"`
			}
			load(page, &p)
			for i, s := range p.Subjects {
				open(fmt.Sprint("subject key ", i), "subject", s.Tag[:], s.Key)
			}
		}
	}
	return found
}

// openWrapped opens a wrapped key by docs/format/keyring.md.
func openWrapped(t *testing.T, appKey []byte, app, kind string, id, blob []byte) []byte {
	t.Helper()
	block, err := aes.NewCipher(appKey)
	if err != nil {
		t.Fatal(err)
	}
	aead, err := cipher.NewGCMWithRandomNonce(block)
	if err != nil {
		t.Fatal(err)
	}
	var aad []byte
	part := func(b []byte) { aad = append(binary.BigEndian.AppendUint32(aad, uint32(len(b))), b...) }
	part([]byte("coffer/v1 key"))
	part([]byte("eu"))
	part([]byte(app))
	aad = append(aad, blob[1:5]...)
	part([]byte(kind))
	part(id)
	key, err := aead.Open(nil, nil, blob[5:], aad)
	if err != nil {
		t.Fatalf("the %s key: %v", kind, err)
	}
	return key
}

// TestCanary runs the real binary with everything logged, rotates its key,
// rebuilds its view, crashes it, and then looks for content, ids, secrets and
// unwrapped keys in every file, log, answer and stack dump.
func TestCanary(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "data")
	base := freePorts(t)
	var logged, printed bytes.Buffer
	var secret canaries
	start := func() (*exec.Cmd, *devClient) {
		cmd := exec.Command("coffer", "serve", "--dev", "--data", dir, "--port-base", fmt.Sprint(base), "--log-level", "debug")
		cmd.Env = append(withoutCoffer(os.Environ()), "GOTRACEBACK=all")
		cmd.Stdout, cmd.Stderr = &printed, &logged
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if cmd.ProcessState == nil {
				_ = cmd.Process.Kill()
				_ = cmd.Wait()
			}
		})
		vars, err := awaitEnv(filepath.Join(dir, "dev.env"))
		if err != nil {
			t.Fatalf("%v\n%s", err, &logged)
		}
		c := newDevClient(t, vars)
		if secret == nil {
			secret = newCanaries(vars)
		}
		secret.add(fmt.Sprint("token ", len(secret)), []byte(vars["COFFER_TOKEN"]))
		return cmd, c
	}
	end := func(cmd *exec.Cmd, signal syscall.Signal) {
		if err := cmd.Process.Signal(signal); err != nil {
			t.Fatal(err)
		}
		_ = cmd.Wait() // a crash is an error
		_ = os.Remove(filepath.Join(dir, "dev.env"))
	}

	cmd, c := start()
	c.fill(secret, 1)
	provider, err := local.Open(t.Context(), local.Options{Path: filepath.Join(dir, "eu", "kek.json")})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := provider.Rotate(t.Context()); err != nil {
		t.Fatal(err)
	}
	_ = provider.Close()
	c.fill(secret, 2)
	before := logged.Len()
	end(cmd, syscall.SIGQUIT)
	if dump := logged.String()[before:]; !strings.Contains(dump, "goroutine ") || !strings.Contains(dump, "SIGQUIT") {
		t.Errorf("no stack dump: %d bytes", len(dump))
	}
	if err := os.RemoveAll(filepath.Join(dir, "eu", "views")); err != nil { // to be rebuilt
		t.Fatal(err)
	}
	cmd, c = start()
	c.fill(secret, 3)
	end(cmd, syscall.SIGKILL)
	cmd, c = start()
	c.fill(secret, 4)
	end(cmd, syscall.SIGINT)

	keys := keysOf(t, dir)
	if len(keys) < 5 {
		t.Fatalf("only %d keys", len(keys))
	}
	for what, key := range keys {
		secret.add(what, key)
	}
	files := secret.searchDir(t, dir)
	secret.search(t, "standard error", logged.Bytes())
	secret.search(t, "standard output", printed.Bytes())
	if n := bytes.Count(logged.Bytes(), []byte("\n")); files < 20 || n < 100 {
		t.Errorf("%d files and %d lines were searched", files, n)
	}
	t.Logf("%d files and %d kB of log searched for %d forms, among them %d unwrapped keys", files, logged.Len()>>10, len(secret), len(keys))
}

// TestCanaryProfiles looks into what the runtime's profiles tell of a process
// that has content and keys in memory.
func TestCanaryProfiles(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "data")
	p, err := node.Dev(t.Context(), node.DevOptions{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = p.Close(t.Context()) }()
	vars, err := readEnv(p.EnvFile)
	if err != nil {
		t.Fatal(err)
	}
	secret := newCanaries(vars)
	newDevClient(t, vars).fill(secret, 1)
	profiles := map[string][]byte{}
	for _, profile := range pprof.Profiles() {
		var b bytes.Buffer
		if err := profile.WriteTo(&b, 0); err != nil {
			t.Fatal(err)
		}
		z, err := gzip.NewReader(&b)
		if err != nil {
			t.Fatal(err)
		}
		raw, err := io.ReadAll(z)
		if err != nil {
			t.Fatal(err)
		}
		profiles[profile.Name()] = raw
	}
	var stacks bytes.Buffer
	if err := pprof.Lookup("goroutine").WriteTo(&stacks, 2); err != nil {
		t.Fatal(err)
	}
	profiles["stacks"] = stacks.Bytes()
	profiles["build"] = []byte(fmt.Sprint(debug.ReadBuildInfo()))
	if err := p.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	for what, key := range keysOf(t, dir) {
		secret.add(what, key)
	}
	if len(profiles["heap"]) < 1000 {
		t.Errorf("a heap profile of %d bytes", len(profiles["heap"]))
	}
	for name, text := range profiles {
		secret.search(t, "profile "+name, text)
	}
}
