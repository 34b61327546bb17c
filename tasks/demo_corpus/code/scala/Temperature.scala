sealed trait Scale
case object Celsius extends Scale
case object Fahrenheit extends Scale

final case class Temperature(degrees: Double, scale: Scale) {
  def toCelsius: Temperature = scale match {
    case Celsius    => this
    case Fahrenheit => Temperature((degrees - 32) * 5 / 9, Celsius)
  }

  override def toString: String = f"$degrees%.1f $scale"
}

object TemperatureDemo {
  def main(args: Array[String]): Unit = {
    val readings = List(Temperature(68, Fahrenheit), Temperature(15, Celsius))
    readings.map(_.toCelsius).foreach(println)
  }
}
