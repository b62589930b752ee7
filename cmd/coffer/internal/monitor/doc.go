// Package monitor counts what a region does: for each app, whose owner reads it
// through the API, and for operators, whose Prometheus scrapes it.
//
// A [Meter] counts requests in memory and appends one record for each app and
// minute to the region's monitoring stream; docs/format/monitoring.md is normative,
// docs/operations/metrics.md lists the metrics.
//
// Promise: nothing counted has an id of a user, conversation or endpoint, and no
// label has a value that callers choose: regions, operations, outcomes, kinds of
// data and projections are closed sets.
//
// Other packages add metrics of their own by [Metrics.Register], with collectors
// whose labels keep that promise; [Metrics.Gather] adds figures that are looked up
// when somebody scrapes.
package monitor
