package kms

// SetPageLimit makes pages split early.
func (k *Keyring) SetPageLimit(n int) { k.pageLimit = n }

// CipherOf returns the cipher of a data key, to see whether it was wiped.
func CipherOf(k *DataKey) interface {
	Open(dst, nonce, ciphertext, additionalData []byte) ([]byte, error)
} {
	return k.aead
}

// AppCipherWorks reports whether the cipher of the app key in memory can still
// seal and open; closing it is up to the caller.
func (k *Keyring) AppCipher(app string) func() bool {
	a := k.cached(app)
	aead := a.keys.app[a.keys.current]
	sealed := aead.Seal(nil, nil, []byte("x"), nil)
	return func() (works bool) {
		defer func() { _ = recover() }()
		_, err := aead.Open(nil, nil, sealed, nil)
		return err == nil
	}
}

// DecodePage and DecodeAppRow are for fuzzing: they return what the bytes
// encode as again.
func DecodePage(path string, value []byte) ([]byte, error) {
	p, err := decodePage(path, Row{Value: value, Revision: 1})
	if err != nil {
		return nil, err
	}
	return encodePage(p)
}

func DecodeAppRow(region, app string, value []byte) ([]byte, error) {
	r, err := decodeAppRow(region, app, value)
	if err != nil {
		return nil, err
	}
	return encodeAppRow(r)
}

// Waiting returns how many creations of subjects wait for the next write.
func (k *Keyring) Waiting(app string) int {
	a := k.cached(app)
	a.creator.mu.Lock()
	defer a.creator.mu.Unlock()
	return len(a.creator.waiting)
}

// DropPages forgets the pages of an app, and nothing else.
func (k *Keyring) DropPages(app string) {
	a := k.cached(app)
	a.mu.Lock()
	defer a.mu.Unlock()
	k.pages.Add(-int64(len(a.leaves)))
	a.leaves = map[string]*page{}
}
