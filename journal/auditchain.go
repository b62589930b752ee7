package journal

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/go-json-experiment/json"
)

// The audit log's limits.
const (
	MaxAuditBytes   = 4 << 10 // of one record
	MaxAuditDetails = 16      // members of Detail
)

// ErrAuditChain means that the audit log is not what was written: a record is
// missing, changed or out of order, or the log ends before its witness. Keep
// the files as they are and find out who could write them.
var ErrAuditChain = errors.New("the audit log does not verify")

// AuditRecord is one record of the audit log, as docs/format/audit.md fixes it.
type AuditRecord struct {
	Version   int               `json:"v"`
	N         uint64            `json:"n,string"`
	Prev      string            `json:"prev"`
	Time      time.Time         `json:"time"`
	Region    string            `json:"region"`
	Actor     string            `json:"actor"`
	Action    string            `json:"action"`
	Target    string            `json:"target,omitzero"`
	Outcome   string            `json:"outcome"`
	RequestID string            `json:"request_id,omitzero"`
	Detail    map[string]string `json:"detail,omitempty"`
}

// AuditHead names a record of the audit log by its number and its hash. Kept
// outside the region it is a witness of everything up to that record.
type AuditHead struct {
	N    uint64 `json:"n,string"`
	Hash string `json:"hash"`
}

// noHash is what the first record follows.
const noHash = "0000000000000000000000000000000000000000000000000000000000000000"

// AuditChain verifies the records of an audit log, given one after the other.
// The zero value expects any first record, because earlier ones may have
// expired.
type AuditChain struct {
	first   uint64
	head    AuditHead
	witness *AuditHead
	met     bool
}

// NewAuditChain returns a chain which also holds the log against a witness.
func NewAuditChain(witness AuditHead) *AuditChain {
	c := &AuditChain{}
	if witness.N > 0 {
		c.witness = &witness
	}
	return c
}

// Add verifies the next payload, as it was stored.
func (c *AuditChain) Add(payload []byte) (AuditRecord, error) {
	var r AuditRecord
	if err := json.Unmarshal(payload, &r, json.RejectUnknownMembers(true)); err != nil {
		return r, fmt.Errorf("%w: after record %d: not a record", ErrAuditChain, c.head.N)
	}
	switch {
	case r.Version != 1:
		return r, fmt.Errorf("%w: record %d has the unknown version %d", ErrAuditChain, r.N, r.Version)
	case r.N == 0:
		return r, fmt.Errorf("%w: a record has the number 0", ErrAuditChain)
	case c.head.N == 0 && r.N == 1 && r.Prev != noHash:
		return r, fmt.Errorf("%w: record 1 has a predecessor", ErrAuditChain)
	case c.head.N != 0 && r.N != c.head.N+1:
		return r, fmt.Errorf("%w: record %d is followed by %d", ErrAuditChain, c.head.N, r.N)
	case c.head.N != 0 && r.Prev != c.head.Hash:
		return r, fmt.Errorf("%w: record %d does not follow from %d as it is now", ErrAuditChain, r.N, c.head.N)
	}
	if c.first == 0 {
		c.first = r.N
	}
	sum := sha256.Sum256(payload)
	c.head = AuditHead{N: r.N, Hash: hex.EncodeToString(sum[:])}
	if c.witness != nil && c.witness.N == r.N {
		if c.witness.Hash != c.head.Hash {
			return r, fmt.Errorf("%w: record %d is not the one of the witness", ErrAuditChain, r.N)
		}
		c.met = true
	}
	return r, nil
}

// Close says whether the log is complete up to its witness. A witness older
// than the first record kept has expired with its record and says nothing.
func (c *AuditChain) Close() error {
	if c.witness == nil || c.met || (c.first > c.witness.N && c.head.N >= c.witness.N) {
		return nil
	}
	return fmt.Errorf("%w: it ends with record %d, the witness is record %d", ErrAuditChain, c.head.N, c.witness.N)
}

// Head is the last record that was verified.
func (c *AuditChain) Head() AuditHead { return c.head }

// First is the number of the first record that was verified.
func (c *AuditChain) First() uint64 { return c.first }

// encode returns the payload of the record that follows head.
func (e AuditEntry) encode(head AuditHead, region string, now time.Time) ([]byte, AuditHead, error) {
	r := AuditRecord{
		Version: 1, N: head.N + 1, Prev: head.Hash, Time: now.UTC().Truncate(time.Millisecond), Region: region,
		Actor: e.Actor, Action: e.Action, Target: e.Target, Outcome: e.Outcome, RequestID: e.RequestID, Detail: e.Detail,
	}
	if head.N == 0 {
		r.Prev = noHash
	}
	payload, err := json.Marshal(r, json.Deterministic(true))
	if err != nil {
		return nil, head, fmt.Errorf("audit record: %w", err)
	}
	if len(payload) > MaxAuditBytes {
		return nil, head, fmt.Errorf("audit record %s: %w: %d bytes of at most %d", e.Action, ErrTooLarge, len(payload), MaxAuditBytes)
	}
	sum := sha256.Sum256(payload)
	return payload, AuditHead{N: r.N, Hash: hex.EncodeToString(sum[:])}, nil
}

func (e AuditEntry) check() error {
	word, _, found := strings.Cut(e.Action, ".")
	plain := func(s string) bool {
		return s != "" && !slices.ContainsFunc([]byte(s), func(c byte) bool {
			return (c < 'a' || c > 'z') && c != '_'
		})
	}
	switch {
	case !found || !plain(word):
		return fmt.Errorf("%w: audit action %s", ErrInvalid, strconv.Quote(e.Action))
	case e.Actor == "" || e.Outcome == "":
		return fmt.Errorf("%w: audit record %s without actor or outcome", ErrInvalid, e.Action)
	case len(e.Detail) > MaxAuditDetails:
		return fmt.Errorf("%w: audit record %s has %d details", ErrInvalid, e.Action, len(e.Detail))
	}
	return nil
}
