package vault_test

import (
	"fmt"

	"github.com/cofferdb/coffer/kms/vault"
)

func ExampleParseURL() {
	o, err := vault.ParseURL("vault+https://vault.example:8200/transit/coffer-eu?auth=approle&role_id=coffer&secret_id_file=/run/secrets/vault")
	if err != nil {
		fmt.Println(err)
		return
	}
	p, err := vault.New(o)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer p.Close()
	fmt.Println(o.Address, o.Mount, o.Key)

	_, err = vault.ParseURL("vault+https://vault.example:8200/transit/coffer-eu?auth=token&token=hvs.…")
	fmt.Println(err)
	// Output:
	// https://vault.example:8200 transit coffer-eu
	// vault: reading the settings: token is a secret: put it into a file and name that with token_file
}
