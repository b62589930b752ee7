# The Vault of docker-compose.yml: server mode, one node, TLS, sealed when it starts.

storage "raft" {
  path    = "/vault/file"
  node_id = "vault"
}

listener "tcp" {
  address         = "0.0.0.0:8200"
  tls_cert_file   = "/vault/secrets/vault.pem"
  tls_key_file    = "/vault/secrets/vault.key"
  tls_min_version = "tls12"
}

api_addr     = "https://vault:8200"
cluster_addr = "https://vault:8201"

# Raft storage is mapped into memory; locking that would lock the whole store. Turn
# swap off on the machine instead.
disable_mlock = true
