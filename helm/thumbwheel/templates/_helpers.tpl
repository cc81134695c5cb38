{{- define "thumbwheel.fullname" -}}
{{- $name := .Release.Name -}}
{{- if not (contains .Chart.Name $name) }}{{ $name = printf "%s-%s" $name .Chart.Name }}{{ end -}}
{{- $name | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- /* The labels below take a dict of `root` (the top scope) and `component`. */ -}}
{{- define "thumbwheel.selector" -}}
app.kubernetes.io/name: {{ .root.Chart.Name }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
{{- with .component }}
app.kubernetes.io/component: {{ . }}
{{- end }}
{{- end -}}

{{- define "thumbwheel.labels" -}}
{{ include "thumbwheel.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ .root.Chart.Name }}-{{ .root.Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "thumbwheel.image" -}}
{{- with .root.Values.image }}{{ .prefix }}{{ $.target }}:{{ .tag | default $.root.Chart.AppVersion }}{{ end -}}
{{- end -}}

{{- /* thumbwheel.toml: the user's settings, and what the chart decides. values.schema.json refuses the latter in the former. */ -}}
{{- define "thumbwheel.toml" -}}
{{- $own := dict
  "data" "/var/lib/thumbwheel/data"
  "log" (dict "path" "/var/lib/thumbwheel/log/log.sqlite")
  "store" (dict "path" "/var/lib/thumbwheel/adapters")
  "engine" (dict "model" (printf "/model/%s" .Values.model.path | trimSuffix "/"))
  "gateway" (dict "host" "0.0.0.0" "port" 8100 "keys" "/etc/thumbwheel-keys/keys.json")
  "learner" (dict "metrics_port" 8101 "device" (ternary "cuda" "cpu" (gt (int .Values.learner.gpus) 0)))
  "guardrails" (dict
    "metrics_port" 8102
    "gateway" (printf "http://%s-gateway:%d" (include "thumbwheel.fullname" .) (int .Values.gateway.service.port))
    "key_file" "/etc/thumbwheel-keys/evaluator.key")
  "deploy" (dict "metrics_port" 8103)
-}}
{{- toToml (mustMergeOverwrite (deepCopy .Values.settings) $own) -}}
{{- end -}}

{{- /* What every pod has in common; a dict of `root` and `component`. */ -}}
{{- define "thumbwheel.pod" -}}
serviceAccountName: {{ include "thumbwheel.fullname" .root }}-{{ .component }}
# Nobody here talks to the Kubernetes API.
automountServiceAccountToken: false
# Kubernetes would put THUMBWHEEL_… variables of its own beside those that override settings.
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .root.Values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .root.Values.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
affinity:
  podAffinity:
    # The log is a SQLite file: one node for all. The first gateway chooses it, since it is the one that needs the GPU;
    # the others wait for a gateway, and a gateway that is started again comes to where the others are.
    requiredDuringSchedulingIgnoredDuringExecution:
      - topologyKey: kubernetes.io/hostname
        labelSelector:
          matchLabels: {{- include "thumbwheel.selector" (dict "root" .root "component" (ternary "" "gateway" (eq .component "gateway"))) | nindent 12 }}
{{- end -}}

{{- /* The container's part that is the same in every program; a dict of `root` and `target`. */ -}}
{{- define "thumbwheel.container" -}}
image: {{ include "thumbwheel.image" . }}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- end -}}

{{- define "thumbwheel.env" -}}
- {name: THUMBWHEEL_CONFIG, value: /etc/thumbwheel/thumbwheel.toml}
# Caches of the libraries: the root file system is read-only, and nothing is fetched at run time.
- {name: HOME, value: /var/lib/thumbwheel/data}
- {name: HF_HUB_OFFLINE, value: "1"}
{{- end -}}

{{- /* A daemon serves /metrics for as long as it runs; a slow answer is a busy one. */ -}}
{{- define "thumbwheel.probes" -}}
readinessProbe:
  httpGet: {path: /metrics, port: metrics}
  periodSeconds: 10
  timeoutSeconds: 10
livenessProbe:
  httpGet: {path: /metrics, port: metrics}
  periodSeconds: 30
  timeoutSeconds: 20
  failureThreshold: 10
{{- end -}}

{{- define "thumbwheel.resources" -}}
{{- $resources := deepCopy .resources -}}
{{- if .gpus }}
{{- $_ := set $resources "limits" (merge (dict .root.Values.gpuResource .gpus) ($resources.limits | default dict)) -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}
