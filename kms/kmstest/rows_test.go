package kmstest_test

import (
	"testing"

	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/kms/kmstest"
)

func TestRows(t *testing.T) {
	kmstest.RunRows(t, kmstest.RowsHarness{
		New:    func(testing.TB) kms.Rows { return kmstest.NewRows() },
		Again:  func(_ testing.TB, r kms.Rows) kms.Rows { return r },
		Search: func(_ testing.TB, r kms.Rows, needle []byte) bool { return r.(*kmstest.Rows).Contains(needle) },
	})
}
