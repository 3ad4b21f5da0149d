#!/bin/sh
# Writes the account settings from the environment, then starts the server. Clients reach it under these host names.
set -eu
umask 077
database="postgresql://mlflow:${POSTGRES_PASSWORD}@postgres:5432/mlflow"
cat > "$MLFLOW_AUTH_CONFIG_PATH" <<SETTINGS
[mlflow]
default_permission = NO_PERMISSIONS
database_uri = sqlite:////var/lib/mlflow/accounts.db
admin_username = ${MLFLOW_TRACKING_USERNAME}
admin_password = ${MLFLOW_TRACKING_PASSWORD}
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
SETTINGS
exec mlflow server --app-name basic-auth --host 0.0.0.0 --port 5000 \
  --backend-store-uri "$database" --artifacts-destination /var/lib/mlflow/artifacts \
  --allowed-hosts "mlflow:5000,localhost:5000,127.0.0.1:5000"
