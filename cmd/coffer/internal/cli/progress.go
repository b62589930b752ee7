package cli

import (
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"github.com/schollz/progressbar/v3"
	"golang.org/x/term"

	"github.com/cofferdb/coffer/cmd/coffer/internal/importer"
)

const (
	quietInterval = 10 * time.Second // between lines when nobody watches
	drawInterval  = 100 * time.Millisecond
)

// progress shows how far an import is: a bar on a terminal, otherwise a line now
// and then. It is also the writer for what is said meanwhile.
type progress struct {
	out     io.Writer
	watched bool // out is a terminal
	start   time.Time

	mu       sync.Mutex // guards what follows
	bar      *progressbar.ProgressBar
	scanning bool
	last     time.Time
}

func newProgress(r *runner) *progress {
	now := time.Now()
	p := &progress{out: r.Stderr, start: now, last: now}
	if f, ok := r.Stderr.(*os.File); ok {
		p.watched = term.IsTerminal(int(f.Fd()))
	}
	return p
}

func (p *progress) show(s importer.Progress) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	if p.scanning && !s.Scanning {
		p.start = now // the rate is that of the import
	}
	p.scanning = s.Scanning
	what := "imported"
	if s.Scanning {
		what = "scanned"
	}
	rate := float64(s.Read) / max(now.Sub(p.start).Seconds(), 0.001)
	if p.watched {
		p.draw(s, fmt.Sprintf("%s %d (%.0f/s)", what, s.Read, rate))
		return
	}
	if now.Sub(p.last) < quietInterval {
		return
	}
	p.last = now
	line := fmt.Sprintf("%s %d lines, %.0f/s", what, s.Read, rate)
	if s.Total > 0 && s.Bytes > 0 {
		done := float64(s.Bytes) / float64(s.Total)
		left := time.Duration(float64(now.Sub(p.start)) * (1 - done) / done)
		line += fmt.Sprintf(", %.0f %%, about %s left", 100*done, spoken(left))
	}
	_, _ = fmt.Fprintln(p.out, line)
}

// draw moves the bar. Its unit is bytes of the files, so that the time left is
// known without counting the lines first.
func (p *progress) draw(s importer.Progress, text string) {
	if p.bar == nil {
		total := s.Total
		if total == 0 {
			total = -1 // a spinner: the end is not known
		}
		p.bar = progressbar.NewOptions64(total,
			progressbar.OptionSetWriter(p.out), progressbar.OptionThrottle(drawInterval), progressbar.OptionFullWidth(),
			progressbar.OptionShowBytes(true), progressbar.OptionSetPredictTime(true), progressbar.OptionClearOnFinish())
	}
	p.bar.Describe(text)
	if s.Total > 0 && s.Bytes >= s.Total {
		return // finish removes it; the last batches may still be under way
	}
	_ = p.bar.Set64(s.Bytes)
}

// Write says something in the middle.
func (p *progress) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.bar != nil {
		_ = p.bar.Clear()
	}
	return p.out.Write(b)
}

func (p *progress) finish() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.bar != nil {
		_ = p.bar.Clear()
	}
}
