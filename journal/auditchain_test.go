package journal

import (
	"bytes"
	"errors"
	"fmt"
	"testing"
	"time"
)

func auditPayloads(t testing.TB, n int) [][]byte {
	t.Helper()
	var out [][]byte
	var head AuditHead
	for i := range n {
		e := AuditEntry{
			Actor: "operator:test", Action: "key.rotate", Target: "kek:local:k", Outcome: "ok",
			RequestID: fmt.Sprint("req-", i), Detail: map[string]string{"version": fmt.Sprint(i), "a": "b"},
		}
		payload, next, err := e.encode(head, "eu", time.Unix(1_700_000_000+int64(i), 0))
		if err != nil {
			t.Fatal(err)
		}
		out, head = append(out, payload), next
	}
	return out
}

func verifyAudit(witness AuditHead, payloads [][]byte) error {
	c := NewAuditChain(witness)
	for _, p := range payloads {
		if _, err := c.Add(p); err != nil {
			return err
		}
	}
	return c.Close()
}

func TestAuditChainFindsEveryChange(t *testing.T) {
	good := auditPayloads(t, 6)
	whole := &AuditChain{}
	for _, p := range good {
		if _, err := whole.Add(p); err != nil {
			t.Fatal(err)
		}
	}
	witness := whole.Head()
	if err := verifyAudit(witness, good); err != nil {
		t.Fatal(err)
	}
	// What has expired at the front is no fault; nor is a witness that expired.
	if err := verifyAudit(witness, good[3:]); err != nil {
		t.Fatal(err)
	}
	early := &AuditChain{}
	if _, err := early.Add(good[0]); err != nil {
		t.Fatal(err)
	}
	if err := verifyAudit(early.Head(), good[2:]); err != nil {
		t.Fatal(err)
	}
	bad := map[string][][]byte{
		"a record removed":   append(append([][]byte{}, good[:2]...), good[3:]...),
		"two swapped":        {good[0], good[2], good[1], good[3], good[4], good[5]},
		"one doubled":        {good[0], good[1], good[1], good[2], good[3], good[4], good[5]},
		"the end cut off":    good[:5],
		"everything gone":    {},
		"another beginning":  append([][]byte{bytes.Replace(good[0], []byte("test"), []byte("tess"), 1)}, good[1:]...),
		"the last one other": append(append([][]byte{}, good[:5]...), bytes.Replace(good[5], []byte("ok"), []byte("no"), 1)),
	}
	for name, payloads := range bad {
		if err := verifyAudit(witness, payloads); !errors.Is(err, ErrAuditChain) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for i := range good {
		for j := range good[i] {
			changed := append([][]byte{}, good...)
			changed[i] = bytes.Clone(good[i])
			changed[i][j] ^= 1
			if err := verifyAudit(witness, changed); !errors.Is(err, ErrAuditChain) {
				t.Fatalf("record %d, byte %d: %v", i, j, err)
			}
		}
	}
}

func TestAuditEntryIsChecked(t *testing.T) {
	many := map[string]string{}
	for i := range MaxAuditDetails + 1 {
		many[fmt.Sprint(i)] = ""
	}
	for name, e := range map[string]AuditEntry{
		"no actor":         {Action: "key.wrap", Outcome: "ok"},
		"no outcome":       {Action: "key.wrap", Actor: "a"},
		"no word":          {Action: "wrap", Actor: "a", Outcome: "ok"},
		"a wildcard":       {Action: "*.wrap", Actor: "a", Outcome: "ok"},
		"an empty word":    {Action: ".wrap", Actor: "a", Outcome: "ok"},
		"too many details": {Action: "key.wrap", Actor: "a", Outcome: "ok", Detail: many},
	} {
		if err := e.check(); !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	long := AuditEntry{Action: "key.wrap", Actor: "a", Outcome: "ok", Target: string(bytes.Repeat([]byte("x"), MaxAuditBytes))}
	if _, _, err := long.encode(AuditHead{}, "eu", time.Now()); !errors.Is(err, ErrTooLarge) {
		t.Errorf("a long one: %v", err)
	}
}

func FuzzAuditChain(f *testing.F) {
	for _, p := range auditPayloads(f, 4) {
		f.Add(p)
	}
	f.Add([]byte(`{"v":1,"n":"1","prev":"","time":"2026-01-02T03:04:05Z","region":"eu","actor":"a","action":"b.c","outcome":"ok"}`))
	f.Add([]byte(`{"v":1,"n":"18446744073709551615"}`))
	f.Fuzz(func(t *testing.T, payload []byte) {
		c := &AuditChain{}
		r, err := c.Add(payload)
		if err != nil {
			if !errors.Is(err, ErrAuditChain) {
				t.Fatal(err)
			}
			return
		}
		if c.Head().N != r.N || r.N == 0 {
			t.Fatal(c.Head(), r.N)
		}
		// Nothing but the next number follows.
		if _, err := c.Add(payload); !errors.Is(err, ErrAuditChain) {
			t.Fatal(err)
		}
	})
}
