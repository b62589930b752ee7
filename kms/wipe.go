package kms

import (
	"reflect"
	"unsafe"
)

// wipe zeroes the expanded key inside a cipher of the standard library, which
// offers no way to do so. It looks for the first pointer to a struct, in the
// value itself or in its first field, and clears what it points to: that is the
// whole of a *gcm.GCM or *aes.Block, both of which hold their keys in arrays.
// What has another shape is left alone, and the test of this function fails.
//
// The caller must be the last user of c.
func wipe(c any) {
	v := reflect.ValueOf(c)
	if v.Kind() == reflect.Struct && v.NumField() > 0 {
		v = v.Field(0)
	}
	if v.Kind() != reflect.Pointer || v.IsNil() || v.Type().Elem().Kind() != reflect.Struct {
		return
	}
	if !pointerFree(v.Type().Elem()) {
		return // the garbage collector must see writes to pointers
	}
	p := v.UnsafePointer()
	clear(unsafe.Slice((*byte)(p), v.Type().Elem().Size())) //nolint:gosec // the struct's own memory
}

// pointerFree reports whether values of type t hold numbers only.
func pointerFree(t reflect.Type) bool {
	switch k := t.Kind(); {
	case k >= reflect.Bool && k <= reflect.Complex128:
		return true
	case k == reflect.Array:
		return pointerFree(t.Elem())
	case k == reflect.Struct:
		for f := range t.Fields() {
			if !pointerFree(f.Type) {
				return false
			}
		}
		return true
	default:
		return false
	}
}
