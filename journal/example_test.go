package journal_test

import (
	"errors"
	"fmt"
	"time"

	"github.com/cofferdb/coffer/journal"
)

func ExampleParseEvent() {
	app, _ := journal.ParseAppID("0300000000000000000000000000007f")
	event, err := journal.ParseEvent([]byte(`{
		"id": "m-1", "type": "message.sent", "time": "2026-11-24T17:59:00Z", "sender": "zoe", "recipient": "bob",
		"data": {"bodies": [{"type": "txt", "msg": "caf\u00e9?"}]}
	}`), app, journal.Limits{})
	if err != nil {
		fmt.Println(err)
		return
	}
	now := time.Date(2026, 11, 24, 18, 0, 0, 0, time.UTC)
	if err := event.Normalize(now, journal.Limits{}); err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(event.Conversation)
	fmt.Println(string(event.Data))
	// Output:
	// bob,zoe
	// {"bodies":[{"type":"txt","msg":"café?"}]}
}

func ExampleInputError() {
	app, _ := journal.ParseAppID("0300000000000000000000000000007f")
	_, err := journal.ParseEvent([]byte(`{"type":"message.sent","sender":"a b"}`), app, journal.Limits{})
	if input, ok := errors.AsType[*journal.InputError](err); ok {
		fmt.Println(input.Pointer)
		fmt.Println(input.Detail)
	}
	// Output:
	// /sender
	// an id must not contain white space
}
