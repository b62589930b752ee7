package erasures

import (
	"encoding/base64"
	"fmt"
	"strings"

	"github.com/go-json-experiment/json"
)

// ParseLine reads a line of a file of receipts, and the region that the receipt
// says it is of, which nothing has verified yet.
func ParseLine(line []byte) (receipt, region string, err error) {
	var l struct {
		Receipt string `json:"receipt"`
	}
	if err := json.Unmarshal(line, &l); err != nil {
		return "", "", fmt.Errorf("%w: a line is {\"receipt\": …}", ErrReceipt)
	}
	parts := strings.Split(l.Receipt, ".")
	if len(parts) != 3 {
		return "", "", fmt.Errorf("%w: not a compact JWS", ErrReceipt)
	}
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		return "", "", fmt.Errorf("%w: not a compact JWS", ErrReceipt)
	}
	var r Receipt
	if err := json.Unmarshal(payload, &r); err != nil {
		return "", "", fmt.Errorf("%w: its content cannot be read", ErrReceipt)
	}
	return l.Receipt, r.Region, nil
}
