# The smallest policy that Coffer works with. "update" and never "create" on encrypt:
# with "create" a mistyped key name would make a new key.
path "transit/datakey/plaintext/coffer-eu" { capabilities = ["update"] }
path "transit/encrypt/coffer-eu"           { capabilities = ["update"] }
path "transit/decrypt/coffer-eu"           { capabilities = ["update"] }
path "transit/rewrap/coffer-eu"            { capabilities = ["update"] }
path "transit/keys/coffer-eu"              { capabilities = ["read"] }
