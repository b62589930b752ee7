package server

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"testing"
	"time"

	"github.com/cofferdb/coffer/journal"
)

func testMAC(_ context.Context, app journal.AppID, purpose string, message []byte) ([32]byte, error) {
	h := hmac.New(sha256.New, append([]byte("a key of the app"), app[:]...))
	h.Write([]byte(purpose))
	h.Write(message)
	return [32]byte(h.Sum(nil)), nil
}

func TestCursorBinding(t *testing.T) {
	ctx := t.Context()
	app, other := journal.NewAppID(3), journal.NewAppID(3)
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	base := binding{list: "events", conversation: "c", user: "u", types: []journal.Type{1, 2}, from: at, until: at.Add(time.Hour)}
	text, err := encodeCursor(ctx, testMAC, app, base, 1<<63+7)
	if err != nil {
		t.Fatal(err)
	}
	if position, ok, err := decodeCursor(ctx, testMAC, app, base, text); err != nil || !ok || position != 1<<63+7 {
		t.Fatalf("its own binding: %v %v %v", position, ok, err)
	}
	same := base
	same.types = []journal.Type{2, 1}
	same.from = at.In(time.FixedZone("x", 3600))
	if _, ok, _ := decodeCursor(ctx, testMAC, app, same, text); !ok {
		t.Error("the same query written another way is refused")
	}
	for name, change := range map[string]func(*binding){
		"list":         func(b *binding) { b.list = "messages" },
		"conversation": func(b *binding) { b.conversation = "d" },
		"moved bytes":  func(b *binding) { b.conversation, b.user = "cu", "" },
		"user":         func(b *binding) { b.user = "" },
		"types":        func(b *binding) { b.types = b.types[:1] },
		"from":         func(b *binding) { b.from = at.Add(1) },
		"no from":      func(b *binding) { b.from = time.Time{} },
		"until":        func(b *binding) { b.until = at },
		"order":        func(b *binding) { b.reverse = true },
	} {
		b := base
		change(&b)
		if _, ok, _ := decodeCursor(ctx, testMAC, app, b, text); ok {
			t.Errorf("another %s is accepted", name)
		}
	}
	if _, ok, _ := decodeCursor(ctx, testMAC, other, base, text); ok {
		t.Error("another app is accepted")
	}
	for i := range text {
		for _, c := range []byte("A_\n") {
			forged := []byte(text)
			if forged[i] == c {
				continue
			}
			forged[i] = c
			if _, ok, _ := decodeCursor(ctx, testMAC, app, base, string(forged)); ok {
				t.Errorf("%q is accepted at %d", c, i)
			}
		}
		if _, ok, _ := decodeCursor(ctx, testMAC, app, base, text[:i]); ok {
			t.Errorf("cut at %d is accepted", i)
		}
	}
}

func FuzzCursor(f *testing.F) {
	app := journal.AppID{3, 1}
	seeds := 0
	for _, b := range []binding{{list: "events"}, {list: "messages", conversation: "a,b", reverse: true}} {
		for _, p := range []journal.Position{0, 1, 1 << 52, 1<<64 - 1} {
			text, err := encodeCursor(f.Context(), testMAC, app, b, p)
			if err != nil {
				f.Fatal(err)
			}
			f.Add(text, b.list, b.conversation)
			seeds++
		}
	}
	if seeds == 0 {
		f.Fatal("no seeds")
	}
	f.Fuzz(func(t *testing.T, text, list, conversation string) {
		b := binding{list: list, conversation: conversation, reverse: list == "messages"}
		position, ok, err := decodeCursor(t.Context(), testMAC, app, b, text)
		if err != nil {
			t.Fatal(err)
		}
		if !ok {
			return
		}
		again, err := encodeCursor(t.Context(), testMAC, app, b, position)
		if err != nil || again != text {
			t.Fatalf("%q is accepted and is written %q", text, again)
		}
	})
}
