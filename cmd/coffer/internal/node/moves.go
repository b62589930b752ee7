package node

import "github.com/cofferdb/coffer/journal"

// openMover makes what changes the plans of the region's apps.
func (r *region) openMover() error {
	r.moved = make(chan struct{}, 1)
	var err error
	r.mover, err = journal.NewMover(journal.MoverConfig{
		Journal: r.journal, Views: r.runner, Log: r.log,
		Progress: func(_ journal.AppID, move journal.Move) {
			if move.Step != journal.MoveDone {
				return
			}
			select {
			case r.moved <- struct{}{}: // clean removes what the plan change has taken away
			default:
			}
		},
	})
	return err
}
