// Package compose holds no code: its tests hold docker-compose.yml to what a loader
// accepts and an operator expects, and run the topology that it describes as plain
// processes, since a machine without containers has to be able to know that it works.
package compose
