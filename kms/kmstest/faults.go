package kmstest

import (
	"context"
	"sync"
	"time"

	"github.com/cofferdb/coffer/kms"
)

// Faults is a provider that fails on demand, and otherwise does what the one
// behind it does. It counts calls. The zero value is of no use: see NewFaults.
type Faults struct {
	behind kms.Provider

	mu     sync.Mutex // guards what follows
	class  error
	left   int // calls that still fail; -1: all
	ops    map[string]bool
	hang   chan struct{}
	delay  time.Duration
	lie    []byte
	counts map[string]int
	items  int
}

// NewFaults stands before a provider.
func NewFaults(behind kms.Provider) *Faults {
	return &Faults{behind: behind, counts: map[string]int{}}
}

// Fail lets every call fail with a class, until Heal. With operations ("unwrap",
// "generate", …) only those fail.
func (f *Faults) Fail(class error, operations ...string) { f.FailNext(-1, class, operations...) }

// FailNext lets the next n calls fail with a class.
func (f *Faults) FailNext(n int, class error, operations ...string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.class, f.left, f.ops = class, n, nil
	if len(operations) > 0 {
		f.ops = map[string]bool{}
		for _, op := range operations {
			f.ops[op] = true
		}
	}
}

// Hang lets every call wait for the end of its context, or for Heal.
func (f *Faults) Hang() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.hang == nil {
		f.hang = make(chan struct{})
	}
}

// Delay lets every call take at least d.
func (f *Faults) Delay(d time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.delay = d
}

// Lie lets Unwrap return another key than the one that was wrapped.
func (f *Faults) Lie(key []byte) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.lie = key
}

// Heal ends every fault. Calls that hang go on.
func (f *Faults) Heal() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.class, f.left, f.ops, f.delay, f.lie = nil, 0, nil, 0, nil
	if f.hang != nil {
		close(f.hang)
		f.hang = nil
	}
}

// Calls returns how many calls of the operations there were, of all without
// any. Calls that failed count.
func (f *Faults) Calls(operations ...string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := 0
	if len(operations) == 0 {
		for _, c := range f.counts {
			n += c
		}
	}
	for _, op := range operations {
		n += f.counts[op]
	}
	return n
}

// Items returns how many keys Rewrap was given.
func (f *Faults) Items() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.items
}

func (f *Faults) before(ctx context.Context, op string) error {
	f.mu.Lock()
	f.counts[op]++
	hang, delay := f.hang, f.delay
	f.mu.Unlock()
	fail := func(class, cause error) error {
		return &kms.Error{Op: op, Provider: "faults", Class: class, Detail: "injected", Cause: cause}
	}
	if hang != nil {
		select {
		case <-hang:
		case <-ctx.Done():
			return fail(kms.ErrUnavailable, ctx.Err())
		}
	}
	if delay > 0 {
		t := time.NewTimer(delay)
		defer t.Stop()
		select {
		case <-t.C:
		case <-ctx.Done():
			return fail(kms.ErrUnavailable, ctx.Err())
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.class == nil || f.left == 0 || f.ops != nil && !f.ops[op] {
		return nil
	}
	if f.left > 0 {
		f.left--
	}
	return fail(f.class, nil)
}

// Describe fails on demand.
func (f *Faults) Describe(ctx context.Context) (kms.Description, error) {
	if err := f.before(ctx, "describe"); err != nil {
		return kms.Description{}, err
	}
	return f.behind.Describe(ctx)
}

// Generate fails on demand.
func (f *Faults) Generate(ctx context.Context, binding kms.Context) ([]byte, kms.Wrap, error) {
	if err := f.before(ctx, "generate"); err != nil {
		return nil, kms.Wrap{}, err
	}
	return f.behind.Generate(ctx, binding)
}

// Wrap fails on demand.
func (f *Faults) Wrap(ctx context.Context, binding kms.Context, key []byte) (kms.Wrap, error) {
	if err := f.before(ctx, "wrap"); err != nil {
		return kms.Wrap{}, err
	}
	return f.behind.Wrap(ctx, binding, key)
}

// Unwrap fails, or lies, on demand.
func (f *Faults) Unwrap(ctx context.Context, binding kms.Context, w kms.Wrap) ([]byte, error) {
	if err := f.before(ctx, "unwrap"); err != nil {
		return nil, err
	}
	f.mu.Lock()
	lie := f.lie
	f.mu.Unlock()
	if lie != nil {
		return append([]byte(nil), lie...), nil
	}
	return f.behind.Unwrap(ctx, binding, w)
}

// Rewrap fails on demand.
func (f *Faults) Rewrap(ctx context.Context, items []kms.RewrapItem) ([]kms.RewrapResult, error) {
	f.mu.Lock()
	f.items += len(items)
	f.mu.Unlock()
	if err := f.before(ctx, "rewrap"); err != nil {
		return nil, err
	}
	return f.behind.Rewrap(ctx, items)
}

// Close closes the provider behind.
func (f *Faults) Close() error { return f.behind.Close() }
