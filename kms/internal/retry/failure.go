package retry

import (
	"context"
	"errors"
	"strings"

	"github.com/cofferdb/coffer/kms"
)

// RequestID keeps a UUID and drops anything else: it goes into errors.
func RequestID(id string) string {
	if len(id) != 36 || strings.Trim(id, "0123456789abcdef-") != "" {
		return ""
	}
	return id
}

// Caused adds that the caller's context ended, where it did.
func Caused(ctx context.Context, err error) error {
	failed, ok := errors.AsType[*kms.Error](err)
	if !ok || ctx.Err() == nil || failed.Cause != nil {
		return err
	}
	clone := *failed
	clone.Cause = ctx.Err()
	return &clone
}
