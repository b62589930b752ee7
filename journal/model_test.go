package journal

import (
	"errors"
	"fmt"
	"log/slog"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/go-json-experiment/json"

	"github.com/cofferdb/coffer/kms"
)

func TestPosition(t *testing.T) {
	for _, tt := range []struct {
		generation uint16
		sequence   uint64
		text       string
	}{
		{0, 0, "0"},
		{0, 1, "1"},
		{0, maxSequence, "4503599627370495"},
		{1, 0, "4503599627370496"},
		{1, 1, "4503599627370497"},
		{MaxGeneration, maxSequence, "18446744073709551615"},
	} {
		p, err := NewPosition(tt.generation, tt.sequence)
		if err != nil {
			t.Fatal(err)
		}
		if p.String() != tt.text || p.Generation() != tt.generation || p.Sequence() != tt.sequence {
			t.Errorf("%d/%d is %s with %d/%d, want %s", tt.generation, tt.sequence, p, p.Generation(), p.Sequence(), tt.text)
		}
		q, err := ParsePosition(tt.text)
		if err != nil || q != p {
			t.Errorf("%s parses as %v, %v", tt.text, q, err)
		}
	}
	// A plan change must move forward in the app's order.
	old, _ := NewPosition(4, maxSequence)
	moved, _ := NewPosition(5, 0)
	if old >= moved {
		t.Error("a later generation does not come after an earlier one")
	}
	for _, s := range []string{"", "-1", "+1", "01", " 1", "1 ", "1.0", "1e3", "0x10", "1_0", "18446744073709551616", "٣"} {
		if p, err := ParsePosition(s); !errors.Is(err, ErrInvalid) {
			t.Errorf("ParsePosition(%q) = %v, %v", s, p, err)
		}
	}
	if _, err := NewPosition(MaxGeneration+1, 1); !errors.Is(err, ErrInvalid) {
		t.Errorf("generation over 12 bits: %v", err)
	}
	if _, err := NewPosition(1, maxSequence+1); !errors.Is(err, ErrInvalid) {
		t.Errorf("sequence over 52 bits: %v", err)
	}
	if b, err := json.Marshal(struct{ P Position }{math.MaxUint64}); err != nil || string(b) != `{"P":"18446744073709551615"}` {
		t.Errorf("in JSON: %s, %v", b, err)
	}
}

func TestAppID(t *testing.T) {
	id := NewAppID(4)
	if id.Region() != 4 {
		t.Errorf("region %d", id.Region())
	}
	parsed, err := ParseAppID(id.String())
	if err != nil || parsed != id {
		t.Errorf("%v parses as %v, %v", id, parsed, err)
	}
	for _, s := range []string{
		"", strings.Repeat("0", 32), strings.Repeat("a", 31), strings.Repeat("a", 33), strings.Repeat("A", 32),
		strings.Repeat("g", 32), "0x" + strings.Repeat("a", 30), strings.Repeat("é", 16),
	} {
		if id, err := ParseAppID(s); !errors.Is(err, ErrInvalid) {
			t.Errorf("ParseAppID(%q) = %v, %v", s, id, err)
		}
	}
}

func TestCertificateIsRedacted(t *testing.T) {
	c := NewCertificate()
	app := App{Certificates: []Certificate{c}}
	marshalled, err := json.Marshal(app)
	if err != nil {
		t.Fatal(err)
	}
	var logged strings.Builder
	slog.New(slog.NewJSONHandler(&logged, nil)).Info("x", "app", app, "certificate", c)
	for _, s := range []string{
		fmt.Sprint(c), fmt.Sprintf("%v %+v %#v %x %X %s %q %d", c, c, c, c, c, c, c, c), fmt.Sprintf("%+v %#v %x", app, app, app.Certificates),
		string(marshalled), logged.String(),
	} {
		if strings.Contains(strings.ToLower(s), c.Reveal()) || strings.Contains(s, fmt.Sprint(c[:8])[1:15]) {
			t.Errorf("the secret shows in %s", s)
		}
	}
	parsed, err := ParseCertificate(c.Reveal())
	if err != nil || parsed != c {
		t.Errorf("the secret does not parse back: %v", err)
	}
	if _, err := ParseCertificate("short"); !errors.Is(err, ErrInvalid) {
		t.Errorf("a short certificate: %v", err)
	}
}

func TestTypes(t *testing.T) {
	for n := range 256 {
		typ := Type(n)
		if !typ.Known() {
			continue
		}
		parsed, err := ParseType(typ.String())
		if err != nil || parsed != typ {
			t.Errorf("%s parses as %d, %v", typ, parsed, err)
		}
		if sent := typ <= ReceiptRead || typ == MemberJoined || typ == MemberLeft; sent == typ.Reserved() {
			t.Errorf("%s: Reserved is %v", typ, typ.Reserved())
		}
	}
	for _, s := range []string{"", "Message.sent", "message.sent ", "message"} {
		if typ, err := ParseType(s); !errors.Is(err, ErrInvalid) {
			t.Errorf("ParseType(%q) = %v, %v", s, typ, err)
		}
	}
	for _, c := range []ConversationType{Direct, Group, Room} {
		if parsed, err := ParseConversationType(c.String()); err != nil || parsed != c {
			t.Errorf("%s parses as %v, %v", c, parsed, err)
		}
	}
}

func TestIDs(t *testing.T) {
	for _, s := range []string{"a", "Z9_@:+=~-", strings.Repeat("x", MaxID), NewEventID(testNow())} {
		if err := errors.Join(CheckUserID(s), CheckEventID(s), CheckConversationID(s)); err != nil {
			t.Errorf("%q: %v", s, err)
		}
	}
	for _, s := range []string{"a.b", "a.", "jo.ann.b", "a..b"} {
		if err := errors.Join(CheckUserID(s), CheckConversationID(s), CheckConversationID(DirectConversation(s, "z"))); err != nil {
			t.Errorf("%q: %v", s, err)
		}
		if CheckEventID(s) == nil {
			t.Errorf("%q is the id of an event", s)
		}
	}
	for _, s := range []string{".", "..", ".a", "a,.b", "a,.."} {
		if CheckUserID(s) == nil || CheckConversationID(s) == nil {
			t.Errorf("%q is accepted", s)
		}
	}
	long := DirectConversation(strings.Repeat("b", MaxID), strings.Repeat("a", MaxID))
	if err := CheckConversationID(long); err != nil {
		t.Errorf("two ids of full length: %v", err)
	}
	if DirectConversation("a", "b") != DirectConversation("b", "a") {
		t.Error("a direct conversation depends on who comes first")
	}
	if err := CheckConversationID(long + "x"); !errors.Is(err, ErrTooLarge) {
		t.Errorf("258 bytes: %v", err)
	}
	if err := CheckUserID("a,b"); !errors.Is(err, ErrInvalid) {
		t.Errorf("a user with a comma: %v", err)
	}

	for c := range 256 {
		id, known := string([]byte{byte(c)}), strings.ContainsRune("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_@:+=~-", rune(c))
		if got := CheckUserID(id) == nil; got != known {
			t.Errorf("the character %q in a user's id: allowed %t", id, got)
		}
		if got := CheckConversationID(id) == nil; got != (known || c == ',') {
			t.Errorf("the character %q in a conversation's id: allowed %t", id, got)
		}
	}

	seen := map[string]bool{}
	for range 1000 {
		id := NewEventID(testNow())
		if seen[id] || len(id) != 36 || id[14] != '7' || !strings.ContainsRune("89ab", rune(id[19])) {
			t.Fatalf("not a fresh UUID of version 7: %s", id)
		}
		seen[id] = true
	}
	if a, b := NewEventID(testNow()), NewEventID(testNow().Add(time.Millisecond)); a[:13] >= b[:13] {
		t.Errorf("%s does not sort before %s", a, b)
	}
}

func TestSubject(t *testing.T) {
	sub := Subject{Plan: "pro", Shard: 3, App: testApp(), Bucket: 15}
	const text = "msg.pro.3.0300000000000000000000000000007f.15"
	if sub.String() != text {
		t.Errorf("got %s", sub)
	}
	if parsed, err := ParseSubject(text); err != nil || parsed != sub {
		t.Errorf("parses as %v, %v", parsed, err)
	}
	for _, s := range []string{
		"", "msg", "msg.", "msg.pro", "msg.pro.3", "msg.pro.3." + testApp().String(), text + ".", text + ".1", "cb" + text[3:],
		"msg..3.0300000000000000000000000000007f.15", "msg.Pro.3.0300000000000000000000000000007f.15", "msg.*.3.0300000000000000000000000000007f.15",
		"msg.pro.03.0300000000000000000000000000007f.15", "msg.pro.-1.0300000000000000000000000000007f.15", "msg.pro.1024.0300000000000000000000000000007f.15",
		"msg.pro.3.0300000000000000000000000000007F.15", "msg.pro.3.0300000000000000000000000000007f.16", "msg.pro.3.0300000000000000000000000000007f.>",
		"msg.pro.3.0300000000000000000000000000007f.+1", "msg.pro.3.0300000000000000000000000000007f.15\n",
	} {
		if parsed, err := ParseSubject(s); !errors.Is(err, ErrInvalid) {
			t.Errorf("ParseSubject(%q) = %v, %v", s, parsed, err)
		}
	}
	for _, tt := range [][2]string{
		{StreamName("eu", "pro", 3), "coffer_eu_msg_pro_3"},
		{StreamSubjects("pro", 3), "msg.pro.3.*.*"},
		{AuditStream("eu"), "coffer_eu_audit"},
		{RegistryBucket("eu"), "coffer_eu_registry"},
		{KeyringBucket("eu"), "coffer_eu_keyring"},
	} {
		if tt[0] != tt[1] {
			t.Errorf("got %s, want %s", tt[0], tt[1])
		}
	}
	if BucketOf(kms.Tag{15: 0x3e}) != 14 {
		t.Errorf("bucket %d", BucketOf(kms.Tag{15: 0x3e}))
	}
}

func TestPlans(t *testing.T) {
	for _, p := range DefaultPlans() {
		if err := p.Validate(); err != nil {
			t.Error(err)
		}
		now := testNow()
		if err := p.Admit(now.Add(-p.Retention+time.Second), now); err != nil {
			t.Errorf("%s: the oldest event that is kept: %v", p.ID, err)
		}
		if err := p.Admit(now.Add(-p.Retention), now); !errors.Is(err, ErrExpired) {
			t.Errorf("%s: an event as old as the retention: %v", p.ID, err)
		}
		if err := p.Admit(now.Add(4*time.Minute), now); err != nil {
			t.Errorf("%s: an event of the near future: %v", p.ID, err)
		}
		e := p.EpochAt(now, 7)
		if now.Before(e.From) || !now.Before(e.Until) || e.Until.Sub(e.From) != p.Epoch || e.Expires.Sub(e.Until) != p.Retention ||
			e.From.Unix()%int64(p.Epoch/time.Second) != 0 || e.Class != p.ID+"/7" {
			t.Errorf("%s: epoch %+v", p.ID, e)
		}
		if next := p.EpochAt(e.Until, 7); !next.From.Equal(e.Until) {
			t.Errorf("%s: after %v comes %v", p.ID, e.Until, next.From)
		}
	}
	p := DefaultPlans()[0]
	if c := p.Clock(testNow().Add(time.Hour), testNow()); !c.Equal(testNow()) {
		t.Errorf("an event dated ahead has the clock %v", c)
	}
	if c := p.Clock(testNow().Add(-time.Hour), testNow()); !c.Equal(testNow().Add(-time.Hour)) {
		t.Errorf("an imported event has the clock %v", c)
	}
	for _, bad := range []Plan{
		{},
		{ID: "a.b", Retention: day, Epoch: time.Hour},
		{ID: "x", Retention: time.Minute, Epoch: time.Minute},
		{ID: "x", Retention: day},
		{ID: "x", Retention: day, Epoch: 2 * day},
		{ID: "x", Retention: day, Epoch: time.Hour, Shards: 2000},
		{ID: "x", Retention: day, Epoch: time.Hour + 1},
	} {
		if err := bad.Validate(); !errors.Is(err, ErrInvalid) {
			t.Errorf("%+v: %v", bad, err)
		}
	}
}

func TestRegions(t *testing.T) {
	numbers := map[byte]bool{}
	for _, r := range DefaultRegions() {
		if err := r.Validate(); err != nil || numbers[r.Number] {
			t.Errorf("%+v: %v", r, err)
		}
		numbers[r.Number] = true
	}
	for _, bad := range []Region{{}, {ID: "eu"}, {ID: "E", Number: 1}, {ID: "eu.x", Number: 1}, {ID: "abcdefghi", Number: 1}} {
		if err := bad.Validate(); !errors.Is(err, ErrInvalid) {
			t.Errorf("%+v: %v", bad, err)
		}
	}
}
