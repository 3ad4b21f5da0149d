# MLflow's server with its user accounts, on PostgreSQL. The first user is made from MLFLOW_TRACKING_USERNAME and
# MLFLOW_TRACKING_PASSWORD; everybody else has no permission until an administrator grants it.
FROM python:3.12-slim
RUN pip install --no-cache-dir "mlflow[auth]>=3.17.2" psycopg2-binary
RUN useradd --create-home --uid 1000 mlflow && mkdir /var/lib/mlflow && chown mlflow /var/lib/mlflow
COPY deploy/mlflow-start.sh /usr/local/bin/mlflow-start
USER mlflow
ENV MLFLOW_AUTH_CONFIG_PATH=/home/mlflow/auth.ini
CMD ["sh", "/usr/local/bin/mlflow-start"]
