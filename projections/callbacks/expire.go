package callbacks

import (
	"context"
	"encoding/binary"
	"fmt"
	"time"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/projections"
)

const (
	// blockSize is how many numbers a row of the expiry table is about.
	blockSize = 256
	// expireBlocks bounds a transaction of Expire, which holds up whoever else
	// writes into the store.
	expireBlocks = 32
	// rangeFrom is from how many deliveries in a row on they are removed as a
	// range: readers would have to pass a million tombstones one by one. Ranges
	// cost each new iterator something until the store writes its memory out, so
	// few deliveries are removed one by one.
	rangeFrom = 128
)

// Expire removes the deliveries whose retention was over a little before now (a
// seventy-second of it at most), and returns their number. Its cost is that of what it removes.
func (v *View) Expire(ctx context.Context, now time.Time) (int, error) {
	hour := v.hour(now.UnixMilli())
	for total := 0; ; {
		if err := v.Ready(); err != nil {
			return total, err
		}
		if err := ctx.Err(); err != nil {
			return total, err
		}
		blocks := 0
		err := v.store.Update(func(txn projections.Txn) (err error) {
			n := 0
			blocks, n, err = v.expire(txn, hour)
			total += n
			return err
		})
		if err != nil {
			return total, fmt.Errorf("callbacks: expire: %w", err)
		}
		if blocks < expireBlocks {
			return total, nil
		}
	}
}

// expire removes what some blocks have.
func (v *View) expire(txn projections.Txn, hour uint32) (blocks, deliveries int, err error) {
	to := binary.BigEndian.AppendUint32([]byte{tableExpiry}, hour+1)
	c := txn.Iterate([]byte{tableExpiry}, to, false)
	defer c.Close()
	var due [][]byte
	for len(due) < expireBlocks && c.Next() {
		if len(c.Key()) != 5+32+8 {
			return 0, 0, damaged("expiry key", len(c.Key()))
		}
		due = append(due, append([]byte(nil), c.Key()...))
	}
	if err := c.Close(); err != nil {
		return 0, 0, err
	}
	f := folder{txn: txn, view: v, progress: make(map[endpointKey]*Progress)}
	for _, b := range due {
		at := endpointKey{app: journal.AppID(b[5:21]), ep: journal.EndpointID(b[21:37])}
		n, err := f.removeBlock(at, binary.BigEndian.Uint64(b[37:]), hour)
		if err != nil {
			return 0, 0, err
		}
		deliveries += n
		txn.Delete(b)
	}
	f.finish()
	return len(due), deliveries, nil
}

// removeBlock removes the deliveries of a block whose time is over; what was
// sent again meanwhile stays. Those that another row of the block is about may go
// with it: their time is over too.
func (f *folder) removeBlock(at endpointKey, block uint64, hour uint32) (int, error) {
	p, err := f.load(at)
	if err != nil {
		return 0, err
	}
	var from, to key
	from.endpoint(tableDeliveries, at.app, at.ep).number(block * blockSize)
	to.endpoint(tableDeliveries, at.app, at.ep).number(block*blockSize + blockSize - 1)
	to.raw([]byte{0}) // the last number is among them
	c := f.txn.Iterate(from.bytes(), to.bytes(), false)
	defer c.Close()
	run := make([]uint64, 0, blockSize) // to be removed, with nothing in between that stays
	removed := 0
	for c.Next() {
		n, err := lastNumber(c.Key())
		if err != nil {
			return 0, err
		}
		d, err := parseDelivery(c.Value())
		if err != nil {
			return 0, err
		}
		if f.view.hour(d.Arrived+f.view.retention.Milliseconds())+1 > hour {
			f.removeRun(at, run)
			run = run[:0]
			continue
		}
		run = append(run, n)
		removed++
		*p.count(d.State)--
		if d.State != journal.DeliveryDone {
			f.leave(at.app, at.ep, n, &d)
		}
	}
	f.removeRun(at, run)
	return removed, c.Close()
}

// removeRun removes deliveries that follow one another.
func (f *folder) removeRun(at endpointKey, run []uint64) {
	var from, to key
	if len(run) >= rangeFrom {
		from.endpoint(tableDeliveries, at.app, at.ep).number(run[0])
		to.endpoint(tableDeliveries, at.app, at.ep).number(run[len(run)-1]).raw([]byte{0})
		f.txn.DeleteRange(from.bytes(), to.bytes())
		return
	}
	for _, n := range run {
		f.txn.Delete(from.endpoint(tableDeliveries, at.app, at.ep).number(n).bytes())
	}
}
