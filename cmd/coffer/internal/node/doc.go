// Package node puts a process together: for each region that it serves the
// stream store (a NATS server inside the process or a connection to one), the
// key provider, the journal, the view store and its runner, and the listener.
//
// Regions share nothing but the process. One that fails to start stops the
// others; one whose keys are away starts, and /readyz says what is wrong.
//
// Promises: the data directory belongs to its owner (0700) and to one process
// at a time; [Process.Close] ends in an order in which nothing acknowledged is
// lost and no request is cut short within the time it is given.
package node
