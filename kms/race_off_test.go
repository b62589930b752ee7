//go:build !race

package kms

// RaceDetector makes pools drop what they are given, so allocations cannot be counted.
const RaceDetector = false
