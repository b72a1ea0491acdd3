{{- define "p2pdist.fullname" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name | trunc 40 | trimSuffix "-" }}
{{- else }}{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 40 | trimSuffix "-" }}{{ end }}
{{- end }}

{{- /* Of one part: (list . "agent"). */}}
{{- define "p2pdist.selector" -}}
app.kubernetes.io/name: {{ (index . 0).Chart.Name }}
app.kubernetes.io/instance: {{ (index . 0).Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{- define "p2pdist.labels" -}}
{{ include "p2pdist.selector" . }}
app.kubernetes.io/version: {{ (index . 0).Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ (index . 0).Release.Service }}
helm.sh/chart: {{ printf "%s-%s" (index . 0).Chart.Name (index . 0).Chart.Version }}
{{- end }}

{{- define "p2pdist.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- /* Where agents find the schedulers. */}}
{{- define "p2pdist.schedulers" -}}
{{- $name := include "p2pdist.fullname" . }}
{{- $rest := printf "%s.svc:%v" .Release.Namespace .Values.scheduler.ports.agents }}
{{- if gt (int .Values.scheduler.replicas) 1 }}
{{- range $number := until (int .Values.scheduler.replicas) }}
{{- if $number }},{{ end }}{{ $name }}-scheduler-{{ $number }}.{{ $name }}-schedulers.{{ $rest }}
{{- end }}
{{- else }}{{ $name }}-scheduler.{{ $rest }}{{ end }}
{{- end }}

{{- define "p2pdist.checked" -}}
{{- if and (not .Values.scheduler.enabled) (not .Values.agent.mdns) }}
{{- fail "agents find each other by a scheduler or by mDNS: set scheduler.enabled or agent.mdns" }}
{{- end }}
{{- if and .Values.agent.mdns (not .Values.agent.hostNetwork) }}
{{- fail "mDNS does not leave a pod's network: set agent.hostNetwork, or use the scheduler and not agent.mdns" }}
{{- end }}
{{- if and .Values.metrics.serviceMonitor.enabled (not .Values.metrics.enabled) }}
{{- fail "metrics.serviceMonitor needs metrics.enabled" }}
{{- end }}
{{- end }}

{{- define "p2pdist.confined" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}
