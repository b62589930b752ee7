package bench

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cofferdb/coffer/journal"
)

const appendCompared = "ours: journal.Append of one event a call, as the HTTP handler has it after journal.ParseEvent, with the caller's id: ids, time and plan checked, " +
	"sealed with its sender's key (%d senders), " +
	"checked for being a repetition, stored as a record of %d bytes, synced, acknowledged with its position; no view follows. " +
	"raw: random payloads of the same size, each writer's its own, and on the same subjects, handed to one committer that publishes what has arrived and syncs it before it answers (%s). " +
	"Both on an embedded server with one replica on the same disk, every writer waiting for its own acknowledgement; " +
	"what is stored is equally large, ours with 160 bytes of header and envelope in it."

// appendBits is in how many bits a round is measured.
const appendBits = 4

// Append measures appends that are synced before they are acknowledged.
func Append(ctx context.Context, o Options) (Report, error) {
	o = o.withDefaults()
	way := ""
	var cases []Case
	for _, writers := range o.Writers {
		c, w, err := appendCase(ctx, o, writers)
		if err != nil {
			return Report{}, fmt.Errorf("measure appending with %d writers: %w", writers, err)
		}
		way = w
		cases = append(cases, c)
	}
	return report("append", "events/s", fmt.Sprintf(appendCompared, senders, o.Size, way), o.Rounds, cases), nil
}

func appendCase(ctx context.Context, o Options, writers int) (c Case, way string, err error) {
	dir, remove, err := tempDir(o)
	if err != nil {
		return c, "", err
	}
	defer remove()
	base, err := template(o.Size)
	if err != nil {
		return c, "", err
	}
	r, err := openRig(ctx, filepath.Join(dir, "ours"), false, o.Log)
	if err != nil {
		return c, "", err
	}
	defer func() { err = joinClose(err, r.close) }()
	if err := r.warm(ctx, base); err != nil {
		return c, "", err
	}
	bare, err := openBare(ctx, filepath.Join(dir, "raw"), o.Size, writers, false)
	if err != nil {
		return c, "", err
	}
	defer func() { err = joinClose(err, bare.close) }()

	var serial atomic.Int64
	ids := make([]idBlock, writers)
	ours := &side{name: "ours", round: func(ctx context.Context) (sample, error) {
		// Ids of their own for each round.
		round := int(serial.Add(1))
		return drive(ctx, o.Duration/appendBits, writers, func(ctx context.Context, w, n int) error {
			e := base
			e.ID = ids[w].at(w, round*100_000_000+n)
			e.Sender, e.Conversation = r.users.at(w+n), r.groups.at(w+n)
			results, err := r.journal.Append(ctx, r.app.ID, e)
			if err != nil {
				return err
			}
			return results[0].Err
		})
	}}
	parsed := &side{name: "ours, and journal.ParseEvent of its JSON before", round: func(ctx context.Context) (sample, error) {
		round := int(serial.Add(1))
		return drive(ctx, o.Duration/appendBits, writers, func(ctx context.Context, w, n int) error {
			e := base
			e.ID, e.Time = ids[w].at(w, round*100_000_000+n), time.Now()
			e.Sender, e.Conversation = r.users.at(w+n), r.groups.at(w+n)
			e, err := journal.ParseEvent(e.AppendJSON(make([]byte, 0, 2*o.Size), r.app.ID), r.app.ID, journal.Limits{})
			if err != nil {
				return err
			}
			results, err := r.journal.Append(ctx, r.app.ID, e)
			if err != nil {
				return err
			}
			return results[0].Err
		})
	}}
	raw := &side{name: "raw", round: func(ctx context.Context) (sample, error) {
		return drive(ctx, o.Duration/appendBits, writers, bare.append)
	}}
	sides := []*side{ours, raw, parsed}

	var single, grouped *side
	if writers == 64 {
		each, err := openBare(ctx, filepath.Join(dir, "each"), o.Size, writers, true)
		if err != nil {
			return c, "", err
		}
		defer func() { err = joinClose(err, each.close) }()
		single = &side{name: "one publish per event, the server syncs each (sync always)", round: func(ctx context.Context) (sample, error) {
			return drive(ctx, o.Duration/appendBits, writers, each.publishOne)
		}}
		sides = append(sides, single)
	}
	pg, skipped, err := startPostgres(ctx, o)
	if err != nil {
		return c, "", err
	}
	if pg != nil {
		defer func() { err = joinClose(err, pg.close) }()
		committer, err := pg.openCommitter(ctx, o.Size)
		if err != nil {
			return c, "", err
		}
		defer func() { err = joinClose(err, committer.close) }()
		grouped = &side{name: pg.version + ", group commit by one committer (multi-row INSERT, fsync on)", round: func(ctx context.Context) (sample, error) {
			return drive(ctx, o.Duration/appendBits, writers, committer.append)
		}}
		sides = append(sides, grouped)
	}

	if err := warmUp(ctx, o, sides...); err != nil {
		return c, "", err
	}
	if err := alternate(ctx, o, appendBits, sides...); err != nil {
		return c, "", err
	}
	c = compare(plural(writers, "writer"), "events/s", ours, raw, parsed, single, grouped)
	c.Paired, c.CPU, c.RawCPU = paired(ours, raw), rounded(median(ours.cpus)), rounded(median(raw.cpus))
	if skipped != "" {
		c.Beside = append(c.Beside, Beside{Name: "Postgres", Skipped: skipped})
	}
	return c, bare.way(), nil
}

func joinClose(err error, closer func() error) error {
	if cerr := closer(); err == nil {
		return cerr
	}
	return err
}

// drive lets writers append, each waiting for its own acknowledgement, until
// the time is over and what was begun is acknowledged.
func drive(ctx context.Context, d time.Duration, writers int, appendOne func(ctx context.Context, writer, n int) error) (sample, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	all := make([][]time.Duration, writers)
	var wg sync.WaitGroup
	begin := time.Now()
	end := begin.Add(d)
	for w := range writers {
		wg.Go(func() {
			latencies := make([]time.Duration, 0, 1024)
			now := time.Now()
			for n := 0; now.Before(end); n++ {
				if err := appendOne(ctx, w, n); err != nil {
					cancel(err)
					return
				}
				after := time.Now()
				latencies = append(latencies, after.Sub(now))
				now = after
			}
			all[w] = latencies
		})
	}
	wg.Wait()
	out := sample{elapsed: time.Since(begin)}
	if err := context.Cause(ctx); err != nil {
		return out, err
	}
	for _, latencies := range all {
		out.count += len(latencies)
		out.latencies = append(out.latencies, latencies...)
	}
	return out, nil
}

func plural(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return strconv.Itoa(n) + " " + noun + "s"
}

// fileExists reports whether there is a file or folder.
func fileExists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}
