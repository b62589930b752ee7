package journal

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/cofferdb/coffer/kms"
)

// Buckets is the number of subjects per app and shard. Every subject costs the
// server memory for as long as it holds a message (84 bytes measured), so
// conversations share them.
const Buckets = 16

// A Subject is where an app's events of one bucket are published:
// "msg.<plan>.<shard>.<app>.<bucket>". It names no user and no conversation. A
// marker of a plan change has a letter and a route generation in place of the
// bucket.
type Subject struct {
	Plan   string
	Shard  int
	App    AppID
	Bucket int
	// Marker is 's', 'o' or 'c', 0 for an event; Generation goes with it.
	Marker     byte
	Generation uint16
}

const (
	markSeal  = 's'
	markOpen  = 'o'
	markClose = 'c'
)

// BucketOf returns the bucket of a conversation: its tag modulo [Buckets].
func BucketOf(conversation kms.Tag) int { return int(conversation[len(conversation)-1] % Buckets) }

// ParseSubject parses a subject; it accepts what [Subject.String] makes and
// nothing else.
func ParseSubject(s string) (Subject, error) {
	rest, ok := strings.CutPrefix(s, "msg.")
	if !ok {
		return Subject{}, fmt.Errorf("subject: %w: not a message subject", ErrInvalid)
	}
	plan, rest, _ := strings.Cut(rest, ".")
	shard, rest, _ := strings.Cut(rest, ".")
	app, bucket, ok := strings.Cut(rest, ".")
	if !ok {
		return Subject{}, fmt.Errorf("subject: %w: not five tokens", ErrInvalid)
	}
	if !isName(plan, 16) {
		return Subject{}, fmt.Errorf("subject: %w: not a plan's id", ErrInvalid)
	}
	sub := Subject{Plan: plan}
	var err error
	if sub.Shard, err = parseSmall(shard, 1024); err != nil {
		return Subject{}, fmt.Errorf("subject shard: %w", err)
	}
	if sub.App, err = ParseAppID(app); err != nil {
		return Subject{}, fmt.Errorf("subject: %w", err)
	}
	if bucket != "" && (bucket[0] == markSeal || bucket[0] == markOpen || bucket[0] == markClose) {
		generation, err := parseSmall(bucket[1:], MaxGeneration+1)
		if err != nil {
			return Subject{}, fmt.Errorf("subject generation: %w", err)
		}
		sub.Marker, sub.Generation = bucket[0], uint16(generation) //nolint:gosec // bounded
		return sub, nil
	}
	if sub.Bucket, err = parseSmall(bucket, Buckets); err != nil {
		return Subject{}, fmt.Errorf("subject bucket: %w", err)
	}
	return sub, nil
}

func parseSmall(s string, limit int) (int, error) {
	n, err := strconv.Atoi(s)
	if err != nil || n < 0 || n >= limit || strconv.Itoa(n) != s {
		return 0, fmt.Errorf("%w: not a decimal number under %d", ErrInvalid, limit)
	}
	return n, nil
}

// String returns the subject's text.
func (s Subject) String() string { return string(s.append(make([]byte, 0, 80))) }

func (s Subject) append(dst []byte) []byte {
	dst = append(dst, "msg."...)
	dst = append(dst, s.Plan...)
	dst = append(dst, '.')
	dst = strconv.AppendInt(dst, int64(s.Shard), 10)
	dst = append(dst, '.')
	dst, _ = s.App.AppendText(dst)
	dst = append(dst, '.')
	if s.Marker != 0 {
		return strconv.AppendUint(append(dst, s.Marker), uint64(s.Generation), 10)
	}
	return strconv.AppendInt(dst, int64(s.Bucket), 10)
}

// StreamName returns the name of a message stream of a region.
func StreamName(region, plan string, shard int) string {
	return "coffer_" + region + "_msg_" + plan + "_" + strconv.Itoa(shard)
}

// StreamSubjects returns the filter for what a message stream holds.
func StreamSubjects(plan string, shard int) string {
	return "msg." + plan + "." + strconv.Itoa(shard) + ".*.*"
}

// AuditStream returns the name of a region's audit stream.
func AuditStream(region string) string { return "coffer_" + region + "_audit" }

// RegistryBucket returns the name of the KV bucket with a region's accounts,
// apps and streams.
func RegistryBucket(region string) string { return "coffer_" + region + "_registry" }

// KeyringBucket returns the name of the KV bucket with a region's wrapped keys.
func KeyringBucket(region string) string { return "coffer_" + region + "_keyring" }

// IncarnationKey is the metadata key under which a stream carries the random id
// that it was created with.
const IncarnationKey = "coffer-incarnation"
