package server_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/fips140"
	"errors"
	"io"
	"net/http"
	"strings"
	"time"

	"github.com/coder/websocket"

	"github.com/cofferdb/coffer/cmd/coffer/internal/exports"
)

// tails are the ways to a message that stay open, asked to end where the app's
// events end.
func (r *retentionSite) tails(a *planApp) map[string]answer {
	r.t.Helper()
	base := "/v1/apps/" + a.id + "/events?follow=false"
	token := r.tokenOf(a.id, a.certificate)
	events := map[string]string{"Accept": "text/event-stream"}
	return map[string]answer{
		"server-sent events":                r.do(request{path: base, token: token, header: events}),
		"server-sent events of the sender":  r.do(request{path: base + "&conversation=ann,ben", token: r.userTokenOf(a.id, a.certificate, "ann"), header: events}),
		"a WebSocket":                       r.socket(base, token),
		"a WebSocket of the recipient":      r.socket(base+"&conversation=ann,ben", r.userTokenOf(a.id, a.certificate, "ben")),
		"an export's file, exported now":    r.exported(a, exports.NDJSON),
		"an hourly export's, exported now":  r.exported(a, exports.Agora),
		"an export's file, exported before": r.exportedBefore(a),
	}
}

// socket reads a WebSocket to its end.
func (r *retentionSite) socket(path, token string) answer {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(r.t.Context(), time.Minute)
	defer cancel()
	var conn *websocket.Conn
	var resp *http.Response
	var err error
	fips140.WithoutEnforcement(func() { // the handshake has SHA-1
		conn, resp, err = websocket.Dial(ctx, strings.Replace(r.url, "https://", "wss://", 1)+path, //nolint:bodyclose // Dial has replaced it
			&websocket.DialOptions{HTTPClient: r.client, HTTPHeader: http.Header{"Authorization": {"Bearer " + token}}})
	})
	if err != nil && resp != nil && resp.StatusCode == http.StatusNotFound {
		return answer{status: resp.StatusCode} // whoever took part in it does no longer
	}
	if err != nil {
		r.t.Fatalf("%s: %v", path, err)
	}
	defer conn.CloseNow() //nolint:errcheck // it has ended
	got := answer{status: http.StatusOK}
	for {
		_, text, err := conn.Read(ctx)
		if websocket.CloseStatus(err) == websocket.StatusNormalClosure || errors.Is(err, io.EOF) {
			return got
		}
		if err != nil {
			r.t.Fatalf("%s: %v", path, err)
		}
		got.body = append(got.body, text...)
	}
}

// export makes an export and waits for its end.
func (r *retentionSite) export(a *planApp, format exports.Format) (path string) {
	r.t.Helper()
	made := r.as(a, "POST", "/exports", `{"format":"`+string(format)+`"}`, 202).json(r.t)
	path = "/exports/" + made["id"].(string) //nolint:errcheck,forcetypeassert // the test ends
	r.until("the export ends", func() bool {
		return r.as(a, "GET", path, "", 200).json(r.t)["state"] == "done"
	})
	return path
}

// files are the contents of an export's files, one after the other.
func (r *retentionSite) files(a *planApp, path string) answer {
	r.t.Helper()
	all := answer{status: http.StatusOK}
	for _, f := range r.as(a, "GET", path+"/manifest", "", 200).json(r.t)["files"].([]any) { //nolint:errcheck,forcetypeassert // the test ends
		name := f.(map[string]any)["name"].(string) //nolint:errcheck,forcetypeassert // the test ends
		got := r.as(a, "GET", path+"/files/"+name, "", 0)
		if got.header.Get("Content-Type") == "application/gzip" {
			unzip, err := gzip.NewReader(bytes.NewReader(got.body))
			if err == nil {
				got.body, err = io.ReadAll(unzip)
			}
			if err != nil {
				r.t.Fatalf("%s of export %s: %v", name, path, err)
			}
		}
		all.body = append(all.body, got.body...)
	}
	return all
}

// exported exports what there is now.
func (r *retentionSite) exported(a *planApp, format exports.Format) answer {
	r.t.Helper()
	path := r.export(a, format)
	defer r.as(a, "DELETE", path, "", 204)
	return r.files(a, path)
}

// exportedBefore fetches the file that was there when the message was. Once exports
// are no longer kept, another is made in its place.
func (r *retentionSite) exportedBefore(a *planApp) answer {
	r.t.Helper()
	if a.export == "" || r.as(a, "GET", a.export, "", 0).status == http.StatusNotFound {
		a.export = r.export(a, exports.NDJSON)
	}
	return r.files(a, a.export)
}

// resent replays everything to a new endpoint, which takes what comes, and reports
// whether the message did.
func (r *retentionSite) resent(a *planApp) bool {
	r.t.Helper()
	r.hooks.status.Store(http.StatusNoContent)
	defer r.hooks.status.Store(http.StatusServiceUnavailable)
	for len(r.hooks.events) > 0 {
		<-r.hooks.events
	}
	endpoint := "/endpoints/" + r.as(a, "POST", "/endpoints", `{"mode":"full","url":"`+r.hooks.URL+`/again"}`, 201).json(r.t)["id"].(string) //nolint:errcheck,forcetypeassert // the test ends
	defer r.as(a, "DELETE", endpoint, "", 204)
	replay := r.as(a, "POST", endpoint+"/replays", `{"from":"2020-01-01T00:00:00Z","rate":10000}`, 202).json(r.t)["id"].(string) //nolint:errcheck,forcetypeassert // the test ends
	r.until("the replay ends", func() bool { return r.as(a, "GET", "/replays/"+replay, "", 200).json(r.t)["state"] == "done" })
	came := false
	for len(r.hooks.events) > 0 {
		event := <-r.hooks.events
		if event["type"] == "endpoint.disabled" {
			continue // the app's failing endpoint was, later than the events that end here
		}
		if event["source"] == "/apps/"+a.id && event["data"] != nil {
			came = true
		}
	}
	return came
}

// exportIs checks all ways to an export that was made.
func (r *retentionSite) exportIs(a *planApp, path string, there bool) {
	r.t.Helper()
	want := map[bool]int{true: http.StatusOK, false: http.StatusNotFound}[there]
	for _, method := range []string{"GET", "HEAD"} {
		for _, below := range []string{"", "/manifest", "/files/" + r.firstFile} {
			if got := r.as(a, method, path+below, "", 0); got.status != want {
				r.t.Errorf("%s %s%s: %d %s, want %d", method, path, below, got.status, got.body, want)
			}
		}
	}
	if got := r.as(a, "GET", "/exports", "", 200); strings.Contains(string(got.body), path[len("/exports/"):]) != there {
		r.t.Errorf("the exports: %s", got.body)
	}
}
