package client

import (
	"context"
	"net/url"
	"strconv"

	"github.com/cofferdb/coffer/journal"
)

// AuditHead returns the witness of the region's audit log: the number and the
// hash of a record not far from its end. Keep it outside the region to hold the
// log against it later.
func (c *Client) AuditHead(ctx context.Context) (h journal.AuditHead, err error) {
	return h, c.getJSON(ctx, operatorGet("/v1/admin/audit/head"), &h)
}

// AuditLog calls fn with the payload of every record of the region's audit log
// from number from on, as it is stored; 0 begins with the first that is kept. It
// does not verify: give the payloads to a journal.AuditChain, which also notices
// an answer that was cut when it has the witness of [Client.AuditHead]. The
// payload is valid during the call.
func (c *Client) AuditLog(ctx context.Context, from uint64, fn func(payload []byte) error) error {
	r := operatorGet("/v1/admin/audit")
	r.accept = "application/x-ndjson"
	if from > 0 {
		r.query = url.Values{"from": {strconv.FormatUint(from, 10)}}
	}
	return c.lines(ctx, r, fn)
}
