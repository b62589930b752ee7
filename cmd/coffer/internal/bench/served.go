package bench

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"

	"github.com/go-json-experiment/json"

	"github.com/cofferdb/coffer/cmd/coffer/internal/config"
	"github.com/cofferdb/coffer/cmd/coffer/internal/node"
	"github.com/cofferdb/coffer/journal"
)

// servedRegion is the one of a development set-up that is measured.
const servedRegion = "eu"

// served is a development set-up in this process, as `coffer serve --dev` runs
// it: the rig is one of its regions, and reached through its TLS listener too.
type served struct {
	*rig

	process *node.Process
	caller  caller
	client  *http.Client
}

// caller is what it takes to call the server.
type caller struct {
	URL   string `json:"url"`
	CA    string `json:"ca"` // a file
	App   string `json:"app"`
	Token string `json:"token"`
}

// serve opens the set-up in a folder. The same folder has the same app.
func serve(ctx context.Context, dir string) (*served, error) {
	process, err := node.Dev(ctx, node.DevOptions{Dir: filepath.Join(dir, "served"), Limits: config.Limits{AppStreams: 1 << 14, Streams: 1 << 14}})
	if err != nil {
		return nil, fmt.Errorf("serve what is measured: %w", err)
	}
	s := &served{process: process}
	if err := s.open(ctx, dir); err != nil {
		return nil, errors.Join(fmt.Errorf("serve what is measured: %w", err), s.close())
	}
	return s, nil
}

func (s *served) open(ctx context.Context, dir string) error {
	parts, ok := s.process.Parts(servedRegion)
	if !ok {
		return errors.New("the region is not there")
	}
	text, err := os.ReadFile(s.process.File)
	if err != nil {
		return err
	}
	var file struct {
		Regions map[string]struct {
			URL   string `json:"COFFER_URL"`
			CA    string `json:"COFFER_CA"`
			App   string `json:"COFFER_APP"`
			Token string `json:"COFFER_TOKEN"`
		} `json:"regions"`
	}
	if err := json.Unmarshal(text, &file); err != nil {
		return err
	}
	s.caller = caller(file.Regions[servedRegion])
	id, err := journal.ParseAppID(s.caller.App)
	if err != nil {
		return err
	}
	s.rig = &rig{
		dir: dir, journal: parts.Journal, view: parts.History, conn: parts.Conn,
		users: makeNames("user", senders), groups: makeNames("group", conversations),
	}
	if s.app, err = s.journal.App(ctx, id); err != nil {
		return err
	}
	settings, err := s.caller.tls()
	if err != nil {
		return err
	}
	s.client = &http.Client{Transport: &http.Transport{TLSClientConfig: settings}} // HTTP/1.1, as with curl
	return nil
}

// tls trusts the development authority only.
func (c caller) tls() (*tls.Config, error) {
	pem, err := os.ReadFile(c.CA)
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pem) {
		return nil, errors.New("the authority's file has no certificate")
	}
	return &tls.Config{RootCAs: roots, ServerName: "localhost", NextProtos: []string{"http/1.1"}, MinVersion: tls.VersionTLS12}, nil
}

func (s *served) close() error {
	if s.client != nil {
		s.client.CloseIdleConnections()
	}
	return s.process.Close(context.Background())
}

// lines replays over HTTP and counts the lines; query begins with "?" or is
// empty.
func (s *served) lines(ctx context.Context, query string) (int, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.caller.URL+"/v1/apps/"+s.caller.App+"/events"+query, nil)
	if err != nil {
		return 0, err
	}
	req.Header.Set("Authorization", "Bearer "+s.caller.Token)
	req.Header.Set("Accept", "application/x-ndjson")
	resp, err := s.client.Do(req)
	if err != nil {
		return 0, err
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusOK {
		return 0, fmt.Errorf("the replay's status is %d", resp.StatusCode)
	}
	count, last, err := countLines(resp.Body)
	if err != nil {
		return 0, err
	}
	var trailer struct {
		End *struct {
			Count int `json:"count"`
		} `json:"end"`
	}
	if err := json.Unmarshal(last, &trailer); err != nil || trailer.End == nil {
		return 0, errors.New("the replay has no trailer")
	}
	if trailer.End.Count != count-1 {
		return 0, fmt.Errorf("the trailer tells of %d events, and there are %d", trailer.End.Count, count-1)
	}
	return count - 1, nil
}

// countLines counts lines, without a copy of each, and returns the last one.
func countLines(r io.Reader) (count int, last []byte, err error) {
	const most = 16 << 10 // of a trailer
	buf := make([]byte, 256<<10)
	for {
		n, err := r.Read(buf)
		count += bytes.Count(buf[:n], []byte{'\n'})
		last = append(last, buf[max(0, n-most):n]...)
		last = append(last[:0], last[max(0, len(last)-most):]...)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return 0, nil, err
		}
	}
	line, whole := bytes.CutSuffix(last, []byte{'\n'})
	if !whole {
		return 0, nil, errors.New("the last line is cut")
	}
	return count, line[bytes.LastIndexByte(line, '\n')+1:], nil
}
