package client_test

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"

	"github.com/go-json-experiment/json/jsontext"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/journal/client"
)

// The URL, the app and the token come from whoever runs the server; a development
// server writes them to dev.env. Here a stand-in answers.
func Example() {
	srv := httptest.NewTLSServer(http.HandlerFunc(standIn))
	defer srv.Close()
	app, err := journal.ParseAppID("0300000000000000000000000000000a")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return
	}

	c, err := client.New(client.Config{URL: srv.URL, App: app, Token: client.StaticToken("007…"), HTTP: srv.Client()})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return
	}
	defer c.Close()
	ctx := context.Background()

	results, err := c.Append(ctx, journal.Event{
		ID: "m1", Type: journal.MessageSent, Sender: "ana", Recipient: "ben",
		Data: jsontext.Value(`{"bodies":[{"type":"txt","msg":"Is the ferry in?"}]}`),
	})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return
	}
	for _, r := range results {
		fmt.Println("appended", r.ID, "at", r.Position, r.Err)
	}

	replay := c.Replay(ctx, client.Query{})
	for e, err := range replay.Events() {
		if err != nil {
			fmt.Println("go on later after", replay.Next(), err)
			return
		}
		event, err := journal.ParseReplayed(e.JSON)
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return
		}
		fmt.Println(e.Position, event.Conversation, event.Sender)
	}
	fmt.Println("read", replay.Count())
	// Output:
	// appended m1 at 1 <nil>
	// 1 ana,ben ana
	// read 1
}

func standIn(w http.ResponseWriter, r *http.Request) {
	if r.Method == http.MethodPost {
		_, _ = io.WriteString(w, `{"data":[{"id":"m1","position":"1","status":"created"}]}`)
		return
	}
	_, _ = io.WriteString(w, `{"specversion":"1.0","id":"m1","source":"/apps/0300000000000000000000000000000a","type":"message.sent",`+
		`"time":"2026-01-02T03:04:05.678Z","conversation":"ana,ben","conversationtype":"direct","sender":"ana","recipient":"ben",`+
		`"datacontenttype":"application/json","data":{"bodies":[{"type":"txt","msg":"Is the ferry in?"}]},"position":"1"}`+"\n"+
		`{"end":{"count":1,"omitted":0,"next":"c1_x","checkpoint":null}}`+"\n")
}
