package embedded

import (
	"strings"
	"testing"
)

func TestMountOptions(t *testing.T) {
	info := []byte(`22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw,discard
31 22 7:0 / /mnt rw,noatime - ext4 /dev/loop0 rw,data=writeback
`)
	for device, want := range map[string]string{
		"254:0": "rw relatime rw discard",
		"7:0":   "rw noatime rw data=writeback",
	} {
		got, ok := mountOptions(info, device)
		if !ok || strings.Join(got, " ") != want {
			t.Errorf("device %s: %v, want %s", device, got, want)
		}
	}
	if _, ok := mountOptions(info, "9:9"); ok {
		t.Error("an unknown device has options")
	}
}
