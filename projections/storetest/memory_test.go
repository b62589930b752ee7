package storetest_test

import (
	"testing"

	"github.com/cofferdb/coffer/projections"
	"github.com/cofferdb/coffer/projections/storetest"
)

func TestMemory(t *testing.T) {
	stores := make(map[string]*storetest.Memory)
	storetest.Run(t, func(t *testing.T) projections.Store {
		if stores[t.Name()] == nil {
			stores[t.Name()] = &storetest.Memory{}
		}
		return stores[t.Name()]
	})
}
