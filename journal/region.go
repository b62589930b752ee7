package journal

import "fmt"

// A Region is a place where all data of its apps stays. Regions share nothing.
type Region struct {
	// ID is the short name, "sg". Lower-case letters and digits, at most 8.
	ID string
	// Place is for people: "Singapore".
	Place string
	// Cloud is the name that the cloud provider gives the region. Key
	// providers compare it with where a key lives.
	Cloud string
	// Number is byte 0 of the id of every app of the region, so that an app's
	// region can be told from its id alone. Not 0, and never reused.
	Number byte
}

// DefaultRegions returns the four regions that exist by default.
func DefaultRegions() []Region {
	return []Region{
		{ID: "sg", Place: "Singapore", Cloud: "ap-southeast-1", Number: 1},
		{ID: "cn", Place: "Beijing", Cloud: "cn-north-1", Number: 2},
		{ID: "eu", Place: "Frankfurt", Cloud: "eu-central-1", Number: 3},
		{ID: "us", Place: "Virginia", Cloud: "us-east-1", Number: 4},
	}
}

// Validate reports whether the region's id and number can be used.
func (r Region) Validate() error {
	if !isName(r.ID, 8) {
		return fmt.Errorf("region id: %w: 1 to 8 lower-case letters and digits", ErrInvalid)
	}
	if r.Number == 0 {
		return fmt.Errorf("region %s: %w: the number is missing", r.ID, ErrInvalid)
	}
	return nil
}

// isName reports whether s can stand in a stream's name and in a subject
// without escaping.
func isName(s string, limit int) bool {
	if s == "" || len(s) > limit {
		return false
	}
	for i := range len(s) {
		c := s[i]
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') {
			return false
		}
	}
	return true
}
